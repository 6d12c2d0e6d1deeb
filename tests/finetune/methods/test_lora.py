"""LoRA: the base at first, what trains where, and the same model when merged (Hu et al. 2021)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from finetune.layers.low_rank import LowRank
from finetune.methods import base, lora
from pretrain import export, pretrained
from pretrain.config import ConfigError, build
from pretrain.models import sites, vision, vlm
from tests import tiny
from tests.finetune.methods.test_clip_adapter import NAMES, TEMPLATES, labelled, zero_shot


def method(loaded, **keys) -> lora.Method:
    torch.manual_seed(0)
    made = lora.Method(lora.Config(name="lora", templates=TEMPLATES, **keys), loaded, NAMES)
    return made.eval()


def moved(made: lora.Method) -> lora.Method:
    with torch.no_grad():
        for update in made.low_ranks().values():
            update.lora_b.normal_(generator=torch.Generator().manual_seed(3))
    return made


@pytest.mark.check("lora", 1)
@torch.no_grad()
def test_before_training_it_is_the_base(loaded):
    batch = labelled()
    want_NK = zero_shot(loaded, batch)
    made = method(loaded, roles=["q", "k", "v", "out", "up", "down"])
    torch.testing.assert_close(made.classify(batch, made.classes()) / made.scale_1, want_NK, rtol=0, atol=1e-6)
    assert (moved(made).classify(batch, made.classes()) / made.scale_1 - want_NK).abs().max() > 1e-3


@pytest.mark.check("lora", 6)
@pytest.mark.parametrize("towers, linears", [("vision", 2), ("text", 2), ("both", 4)])
def test_counts(loaded, towers, linears):
    made = method(loaded, towers=towers, rank=2)
    assert len(made.low_ranks()) == linears  # two layers a tower, each with a fused qkv
    assert sum(p.numel() for p in made.trained().values()) == linears * 3 * 2 * (32 + 32)
    assert all(update.chosen == (0, 1, 2) for update in made.low_ranks().values())


@pytest.mark.check("lora", 6)
def test_counts_by_role(loaded):
    made = method(loaded, towers="text", roles=["v", "out", "up", "down"], rank=3)
    want = 2 * 3 * ((32 + 32) + (32 + 32) + (32 + 128) + (128 + 32))  # v, out, up, down of two layers
    assert sum(p.numel() for p in made.trained().values()) == want


@pytest.mark.check("lora", 6)
def test_of_clip_b16_with_the_published_ranks():
    """q, k and v of 12 + 12 layers, rank 2: 184,320 parameters."""
    with torch.device("meta"):
        updates = [
            LowRank(torch.nn.Linear(width, 3 * width), rank=2, alpha=1.0, parts=3, chosen=(0, 1, 2))
            for width in (768, 512)
        ]
    assert 12 * sum(u.lora_a.numel() + u.lora_b.numel() for u in updates) == 12 * 3 * 2 * 2 * (768 + 512)


@pytest.mark.check("lora", 4)
@pytest.mark.parametrize("towers", ["vision", "text", "both"])
def test_only_updates_have_a_gradient_and_only_they_leave_eval_mode(loaded, towers):
    module = base.Finetune(moved(method(loaded, towers=towers))).train()
    assert not module.method.model.vision.training and not module.method.model.text.training
    assert all(update.dropout.training for update in module.method.low_ranks().values())
    module([labelled()])[0].backward()
    with_grad = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_grad == {f"method.{name}" for name in module.method.trained()}
    assert all(name.endswith(("lora_a", "lora_b")) for name in with_grad)
    module.eval()
    assert not any(update.dropout.training for update in module.method.low_ranks().values())


@pytest.mark.check("lora", 3)
@torch.no_grad()
def test_merged_it_is_a_model_like_any_other(loaded):
    before = loaded.model.state_dict().keys()
    made, batch = moved(method(loaded, roles=["q", "v", "up", "out"])), labelled()
    want = made.model(batch)
    image_NE, text_BE = want.image, want.text
    made.merge()
    assert loaded.model.state_dict().keys() == before and not made.low_ranks()
    torch.testing.assert_close(made.model(batch).image, image_NE, rtol=0, atol=2e-6)
    torch.testing.assert_close(made.model(batch).text, text_BE, rtol=0, atol=2e-6)
    assert pretrained.hash_of(loaded.model.state_dict()) != loaded.weights_hash


def with_room() -> vlm.Config:
    """Return a model whose text tower reads the tests' sentences to their ends."""
    section = tiny.vit_section()
    section.text.context_length = 40
    return section


def of_timm(name: str, **args: object) -> vlm.Config:
    section = with_room()
    section.vision = vision.Config(name=name, image_size=32, args={"depth": 2, "patch_size": 8, **args})
    return section


SMALL = {"embed_dim": 32, "num_heads": 2}
TOWERS = {
    "beit": of_timm("beit_base_patch16_224", **SMALL),  # biases of q and v beside a fused qkv
    "eva": of_timm("eva02_tiny_patch14_224", **SMALL, qkv_fused=True),  # the same, with rotary positions
    "eva unfused": of_timm("eva02_base_patch14_224", **SMALL),  # q, k and v are linears of their own; a gated mlp
    "vit": of_timm("vit_tiny_patch16_224", **SMALL, class_token=False, global_pool="avg"),
}


@pytest.mark.check("lora", 8)
@pytest.mark.parametrize("kind", TOWERS)
def test_on_timms_towers_it_starts_as_the_base_trains_and_merges(kind):
    loaded, batch = tiny.pretrained_model(TOWERS[kind]), labelled()
    with torch.no_grad():
        want_NE = loaded.model.eval()(batch).image
    before = loaded.model.state_dict().keys()
    made = method(loaded, towers="vision", roles=["q", "v", "out"], dropout=0.0)
    assert {name.rpartition(".")[2] for name in made.low_ranks()} <= {"qkv", "q_proj", "v_proj", "proj"}
    torch.testing.assert_close(made.model(batch).image, want_NE, rtol=0, atol=2e-6)
    base.Finetune(made).train()([batch])[0].backward()
    assert all(u.lora_b.grad.abs().amax((1, 2)).min() > 0 for u in made.low_ranks().values()), "a part does not train"
    with torch.no_grad():
        want_NE = moved(made).eval().model(batch).image
        made.merge()
        torch.testing.assert_close(made.model(batch).image, want_NE, rtol=0, atol=2e-6)
    assert loaded.model.state_dict().keys() == before


@pytest.mark.check("lora", 8)
def test_on_a_folder_of_transformers_clip(tmp_path):
    """Its towers become ours: the updates, merged and exported again, are seen by transformers itself."""
    export.export(tiny.pretrained_model(with_room()), tmp_path / "base", format="hf")
    loaded, batch = pretrained.load(tmp_path / "base"), tiny.batch()
    made = moved(method(loaded, roles=["q", "v", "down"]))
    assert len(made.low_ranks()) == 2 * 2 * 2
    made.merge()
    export.export(loaded, tmp_path / "tuned", format="hf")  # verified against transformers before it is kept
    before, after = (CLIPModel.from_pretrained(tmp_path / name).eval() for name in ("base", "tuned"))
    pixels = {"pixel_values": batch.image_NCHW}
    with torch.no_grad():
        found, seen = (model.get_image_features(**pixels) for model in (before, after))
        found_NE, seen_NE = (x if torch.is_tensor(x) else x.pooler_output for x in (found, seen))
        torch.testing.assert_close(F.normalize(seen_NE, dim=-1), loaded.model(batch).image, rtol=0, atol=1e-5)
    assert (found_NE - seen_NE).abs().max() > 1e-3


@pytest.mark.check("lora", 8)
def test_on_a_text_encoder_of_transformers_clip(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    CLIPTextModel(CLIPTextConfig(vocab_size=tiny.VOCABULARY, **sizes)).save_pretrained(tmp_path)
    section = tiny.vit_section()
    section.text.name = f"hf:{tmp_path}"
    model = tiny.model(section)
    roles = ("q", "k", "v", "out", "up", "down")
    found = sites.sites(model, tower="text", roles=roles)
    assert [(s.role, s.layer) for s in found] == [(role, layer) for layer in (0, 1) for role in roles]


@pytest.mark.check("lora", 9)
def test_refusals(loaded):
    with pytest.raises(ConfigError, match="names a role twice"):
        build(lora.Config, {"name": "lora", "roles": ["q", "q"]})
    resnet = vision.Config(name="resnet50_clip", image_size=32)
    with torch.device("meta"):
        towers = nn.ModuleDict({"vision": vision.VisionTower(resnet, 16)})
    with pytest.raises(ConfigError, match="the vision's layers offer no sites"):
        sites.sites(towers, tower="vision")
    with pytest.raises(ConfigError, match=r"the vision's layers offer no sites; .* need a transformer tower"):
        method(tiny.pretrained_model(tiny.conv_section()))
    with pytest.raises(ConfigError, match="base has no linear for up; it has down, k, out, q, v"):
        method(tiny.pretrained_model(TOWERS["eva unfused"]), roles=["q", "up"])

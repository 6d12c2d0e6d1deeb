"""LoRA: the base at first, what trains where, and the same model when merged (Hu et al. 2021)."""

import pytest
import torch

from finetune.layers.low_rank import LowRank
from finetune.methods import base, lora
from pretrain import pretrained
from pretrain.config import ConfigError, build
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


@torch.no_grad()
def test_before_training_it_is_the_base(loaded):
    batch = labelled()
    want_NK = zero_shot(loaded, batch)
    made = method(loaded, roles=["q", "k", "v", "out", "up", "down"])
    torch.testing.assert_close(made.classify(batch, made.classes()) / made.scale_1, want_NK, rtol=0, atol=1e-6)
    assert (moved(made).classify(batch, made.classes()) / made.scale_1 - want_NK).abs().max() > 1e-3


@pytest.mark.parametrize("towers, linears", [("vision", 2), ("text", 2), ("both", 4)])
def test_counts(loaded, towers, linears):
    made = method(loaded, towers=towers, rank=2)
    assert len(made.low_ranks()) == linears  # two layers a tower, each with a fused qkv
    assert sum(p.numel() for p in made.trained().values()) == linears * 3 * 2 * (32 + 32)
    assert all(update.chosen == (0, 1, 2) for update in made.low_ranks().values())


def test_counts_by_role(loaded):
    made = method(loaded, towers="text", roles=["v", "out", "up", "down"], rank=3)
    want = 2 * 3 * ((32 + 32) + (32 + 32) + (32 + 128) + (128 + 32))  # v, out, up, down of two layers
    assert sum(p.numel() for p in made.trained().values()) == want


def test_of_clip_b16_with_the_published_ranks():
    """q, k and v of 12 + 12 layers, rank 2: 184,320 parameters."""
    with torch.device("meta"):
        updates = [
            LowRank(torch.nn.Linear(width, 3 * width), rank=2, alpha=1.0, parts=3, chosen=(0, 1, 2))
            for width in (768, 512)
        ]
    assert 12 * sum(u.lora_a.numel() + u.lora_b.numel() for u in updates) == 12 * 3 * 2 * 2 * (768 + 512)


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


def test_refusals(loaded):
    with pytest.raises(ConfigError, match="names a role twice"):
        build(lora.Config, {"name": "lora", "roles": ["q", "q"]})
    conv = tiny.pretrained_model(tiny.conv_section())
    with pytest.raises(ConfigError, match="the vision's layers offer no q or k or v or qkv"):
        method(conv)

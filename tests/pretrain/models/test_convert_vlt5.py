"""T5, BART and the released VL-T5 layout: logits equal transformers', names go both ways, nothing is left over."""

import pytest
import torch

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.engine import deferred
from pretrain.models import base, convert_vlt5, vlt5
from tests.pretrain.models import tiny_vlt5

BACKBONES = pytest.mark.parametrize("backbone", ["t5", "bart"])


@pytest.mark.check("vl-t5", 2)
@BACKBONES
@torch.no_grad()
def test_without_pictures_it_is_the_text_model(backbone: str) -> None:
    theirs, ours = tiny_vlt5.theirs(backbone), tiny_vlt5.model(tiny_vlt5.section(backbone))
    found = convert_vlt5.weights_from(theirs.state_dict(), source="here")
    missing, left = ours.load_state_dict(found, strict=False)
    assert not left and all(name.startswith("visual_embedding.") for name in missing)
    batch = tiny_vlt5.batch(regions=(0, 0, 0, 0))
    asked = {"input_ids": batch.tokens_BT, "attention_mask": batch.valid_BT.long()}
    expected_BUV = theirs(**asked, decoder_input_ids=batch.decoder_tokens_BU).logits
    assert torch.allclose(ours(batch).logits_BUV, expected_BUV, atol=1e-5)
    memory = ours.text.encode(batch.tokens_BT, batch.valid_BT)  # no visual tokens at all
    assert torch.allclose(ours.write(batch.decoder_tokens_BU, memory), expected_BUV, atol=1e-5)
    for tensor in theirs.state_dict().values():
        tensor.zero_()
    theirs.load_state_dict(convert_vlt5.weights_to(ours.config.text, ours.state_dict(), seen=False), strict=True)
    assert torch.equal(theirs(**asked, decoder_input_ids=batch.decoder_tokens_BU).logits, expected_BUV)


def released(backbone: str) -> tuple[vlt5.VLT5, dict[str, torch.Tensor]]:
    made = tiny_vlt5.model(tiny_vlt5.section(backbone))
    return made, convert_vlt5.weights_to(made.config.text, made.state_dict(), seen=True)


@BACKBONES
def test_the_released_layout(backbone: str) -> None:
    made, state = released(backbone)
    prefix = "encoder.visual_embedding." if backbone == "t5" else "model.encoder.visual_embedding."
    norms = ["feat_embedding.1.weight", "absolute_vis_pos_embedding.1.weight"]
    norms = norms if backbone == "t5" else ["layer_norm.weight", "layer_norm.bias"]
    linears = [f"{part}.0.{leaf}" for part in ("feat_embedding", "absolute_vis_pos_embedding") for leaf in
               ("weight", "bias")]  # fmt: skip
    expected = {*linears, *norms, "img_order_embedding.weight", "obj_order_embedding.weight"}
    assert {name.removeprefix(prefix) for name in state if name.startswith(prefix)} == expected
    assert state[f"{prefix}obj_order_embedding.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    old = {f"module.{name}".replace("encoder.", "vis_encoder.", 1): x for name, x in state.items() if "dec" not in name}
    old |= {name: x for name, x in state.items() if "decoder." in name}
    old["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)
    for layout in (state, old):
        back = convert_vlt5.weights_from(layout, source="here")
        assert back.keys() == made.state_dict().keys()
        assert all(torch.equal(x, made.state_dict()[name]) for name, x in back.items())


def test_a_head_of_its_own_is_refused() -> None:
    _, state = released("t5")
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from the word table"):
        convert_vlt5.weights_from({**state, "lm_head.weight": state["lm_head.weight"] + 1}, source="here")
    with pytest.raises(ConfigError, match="no word table"):
        convert_vlt5.weights_from({"a": torch.zeros(1)}, source="here")


def more_words(backbone: str, where: str, **text) -> vlt5.Config:
    return tiny_vlt5.section(backbone, text={"weights": where, "vocab_size": None, **text})


def build(config: vlt5.Config, size: int = tiny_vlt5.VOCABULARY + 7, *, seeded: bool = False) -> vlt5.VLT5:
    if not seeded:
        dist.seed_step(0, "weights")
    return vlt5.VLT5.build(config, base.Vocabulary(size, end=1, pad=0, start=2))


@pytest.mark.check("vl-t5", 7)
@BACKBONES
def test_a_start_from_a_folder_keeps_new_rows_as_drawn(backbone: str, tmp_path) -> None:
    theirs = tiny_vlt5.theirs(backbone)
    theirs.save_pretrained(tmp_path)
    made, drawn = build(more_words(backbone, f"hf:{tmp_path}")), build(more_words(backbone, None))
    table_VC = made.text.shared.weight
    assert torch.equal(table_VC[: tiny_vlt5.VOCABULARY], theirs.get_input_embeddings().weight)
    assert torch.equal(table_VC[tiny_vlt5.VOCABULARY :], drawn.text.shared.weight[tiny_vlt5.VOCABULARY :])
    assert torch.equal(made.visual_embedding.feat_embedding[0].weight, drawn.visual_embedding.feat_embedding[0].weight)
    batch = tiny_vlt5.batch(regions=(0, 0, 0, 0))
    logits_BUV = theirs(batch.tokens_BT, batch.valid_BT.long(), batch.decoder_tokens_BU).logits
    found_BUV = made.eval()(batch).logits_BUV
    assert torch.allclose(found_BUV[..., : tiny_vlt5.VOCABULARY], logits_BUV, atol=1e-5)
    assert made.config.bare().text.weights is None and "weights" not in made.config.architecture()["text"]


@BACKBONES
def test_a_start_from_a_released_file(backbone: str, tmp_path) -> None:
    made, state = released(backbone)
    torch.save(state, tmp_path / "Epoch30_LXMERT.pth")
    again = build(more_words(backbone, str(tmp_path / "Epoch30_LXMERT.pth")), tiny_vlt5.VOCABULARY)
    assert all(torch.equal(x, made.state_dict()[name]) for name, x in again.state_dict().items())


def test_a_start_in_parts_is_that_of_a_whole(tmp_path) -> None:
    tiny_vlt5.theirs("t5").save_pretrained(tmp_path)
    config = more_words("t5", f"hf:{tmp_path}")
    whole = build(config).state_dict()
    dist.seed_step(0, "weights")
    with deferred.recording() as record:
        parts = build(config, seeded=True)
    deferred.materialise(parts, record, lambda p: None)
    assert all(torch.equal(x, whole[name]) for name, x in parts.state_dict().items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"backbone": "bart"}, "of type 't5'"),
        ({"layers": 3}, r"model.text.layers: 3, .* has num_layers 2"),
        ({"hidden": 32}, r"model.text.hidden: 32, .* has d_ff 24"),
        ({"head_width": 4}, r"model.text.head_width: 4, .* has d_kv 8"),
        ({"vocab_size": 299}, "set it to 300"),
    ],
)
def test_another_architecture_is_refused(tmp_path, text: dict, words: str) -> None:
    tiny_vlt5.theirs("t5").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        build(more_words(text.pop("backbone", "t5"), f"hf:{tmp_path}", **text), 290)
    with pytest.raises(ConfigError, match="cannot be read"):
        build(more_words("t5", f"hf:{tmp_path / 'nothing'}"))

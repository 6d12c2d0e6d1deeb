"""OFA's released layouts: names there and back, and logits of the released model's own code for the same weights.

GOLDEN was computed with `OFAModel` of modelscope 1.9.5 (the transformers layout of the release) in float64.
"""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BartConfig, BartModel

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import base, convert_ofa, ofa

WORDS = base.Vocabulary(106, end=2, pad=1, start=0)
#: (row, place, word) -> logit; rows 0 and 2 write text, 1 and 3 codes, row 2 has no picture
GOLDEN = {
    (0, 0, 3): -0.577059163433,
    (0, 19, 50): -0.423319547982,
    (1, 1, 5): -0.190949738571,
    (1, 17, 70): 0.764454100287,
    (2, 3, 99): 0.328980218172,
    (2, 19, 0): 0.533309649347,
    (3, 10, 41): 0.641222608365,
    (3, 19, 105): -0.208854516606,
}


def section() -> ofa.Config:
    """Return the model that GOLDEN was computed with."""
    return ofa.Config(
        width=32, hidden=64, heads=4, encoder_layers=2, decoder_layers=2, stem="resnet50", image_size=96,
        code_image_size=64, codes=64, bins=10,
    )  # fmt: skip


def filled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return waves in the place of each weight, by its place among the sorted names; gains and variances around 1."""
    out = {}
    for number, (name, value) in enumerate(sorted(state.items())):
        if not value.is_floating_point():
            out[name] = value
            continue
        tied = 0 if name in convert_ofa.WORDS else number
        wave = 0.1 * torch.sin(0.37 * torch.arange(value.numel(), dtype=torch.float64) + tied)
        gain = value.ndim == 1 and name.endswith(("weight", "running_var", "c_attn"))
        out[name] = (wave + gain).view(value.shape)
    return out


def batch() -> Batch:
    """Return what GOLDEN was computed for."""
    valid_BT = torch.arange(7) < torch.tensor([7, 5, 6, 7])[:, None]
    tokens_BT = (torch.arange(28).view(4, 7) * 5 % 90 + 3).masked_fill(~valid_BT, 1)
    decoder_tokens_BU = torch.arange(80).view(4, 20) * 7 % 100 + 3
    decoder_tokens_BU[:, 0] = 0
    image_NCHW = torch.sin(0.013 * torch.arange(3 * 3 * 96 * 96, dtype=torch.float64)).view(3, 3, 96, 96)
    return Batch(
        keys=list("abcd"),
        image_NCHW=image_NCHW,
        owner_N=torch.tensor([0, 1, 3]),
        tokens_BT=tokens_BT,
        valid_BT=valid_BT,
        decoder_tokens_BU=decoder_tokens_BU,
        codes_B=torch.tensor([False, True, False, True]),
    )


def model() -> ofa.OFA:
    """Return our model with the weights that GOLDEN was computed with."""
    made = ofa.OFA.build(section(), WORDS).double().eval()
    made.load_state_dict(convert_ofa.to_ours(filled(convert_ofa.to_transformers(made.state_dict()))))
    return made


def test_logits_of_the_released_code() -> None:
    logits_BUV = model()(batch()).logits_BUV
    assert {place: pytest.approx(logits_BUV[place].item(), abs=1e-9) for place in GOLDEN} == GOLDEN


def test_names_there_and_back() -> None:
    made = model()
    ours = made.state_dict()
    for layout in (convert_ofa.to_fairseq, convert_ofa.to_transformers):
        released = layout(ours)
        names = ("encoder.version", "decoder.image_position_idx", "encoder.token_rp_bucket", "classification_heads.x.w")
        derived = dict.fromkeys(names, torch.zeros(1))
        back = convert_ofa.to_ours({**released, **derived})
        assert back.keys() == ours.keys() and all(torch.equal(back[name], value) for name, value in ours.items())
    fairseq = convert_ofa.to_fairseq(ours)
    assert {"encoder.layers.0.self_attn.c_attn", "encoder.token_rel_pos_table_list.1.weight", "decoder.pos_ln.bias",
            "decoder.output_projection.weight", "decoder.layers.1.encoder_attn.k_proj.bias",
            "encoder.embed_images.layer3.5.bn2.running_mean"} <= set(fairseq)  # fmt: skip
    theirs = convert_ofa.to_transformers(ours)
    named = {"encoder.layers.0.self_attn_mid_layer_norm.weight", "decoder.layers.0.cross_attn.q_proj.weight",
             "decoder.layers.0.cross_attn_layer_norm.weight", "decoder.layers.0.ffn_layer_norm.bias"}  # fmt: skip
    assert named <= set(theirs)


def test_other_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="not OFA's"):
        convert_ofa.to_ours({"text.weight": torch.zeros(1)})
    untied = convert_ofa.to_fairseq(model().state_dict())
    untied["decoder.output_projection.weight"] = untied["decoder.output_projection.weight"] + 1
    with pytest.raises(ConfigError, match="OFA ties them"):
        convert_ofa.to_ours(untied)


def test_bart_fills_the_text_stack(tmp_path: Path) -> None:
    theirs = BartModel(
        BartConfig(
            vocab_size=32, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=1024,
        )
    ).state_dict()  # fmt: skip
    ours = ofa.OFA.build(section(), WORDS).state_dict()
    taken = convert_ofa.from_bart(theirs, ours)
    left = {name for name in ours if name not in taken}
    assert not any(name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) and "embed_images" not in name
                   for name in left - {"encoder.image_proj.weight"})  # fmt: skip
    assert {"decoder.layer_norm.weight", "decoder.layers.0.cross_attn_ln.weight"} <= left
    assert torch.equal(taken["embed_tokens.weight"][:32], theirs["shared.weight"])
    assert torch.equal(taken["embed_tokens.weight"][32:], ours["embed_tokens.weight"][32:])
    assert torch.equal(
        taken["encoder.positions.embed_positions.weight"][:1024], theirs["encoder.embed_positions.weight"][2:]
    )
    assert torch.equal(
        taken["decoder.layers.1.encoder_attn.v_proj.bias"], theirs["decoder.layers.1.encoder_attn.v_proj.bias"]
    )
    assert all(taken[name].shape == ours[name].shape for name in taken)
    with pytest.raises(ConfigError, match="take its width"):
        convert_ofa.from_bart({**theirs, "shared.weight": torch.zeros(32, 16)}, ours)


def test_a_run_may_start_from_files(tmp_path: Path) -> None:
    released = convert_ofa.to_fairseq(model().float().state_dict())
    torch.save({"model": released, "args": argparse.Namespace(arch="ofa_base"), "cfg": None}, tmp_path / "ofa.pt")
    started = ofa.OFA.build(section().model_copy(update={"weights": str(tmp_path / "ofa.pt")}), WORDS)
    assert all(torch.equal(value.float(), started.state_dict()[name].float()) for name, value in
               model().float().state_dict().items())  # fmt: skip
    assert not started.config.from_scratch and started.config.bare().weights is None
    parts = {name: value for name, value in convert_ofa.to_ours(released).items() if "embed_images." in name}
    save_file({name.partition("embed_images.")[2]: value.clone() for name, value in parts.items()},
              tmp_path / "stem.safetensors")  # fmt: skip
    stem = ofa.OFA.build(section().model_copy(update={"stem_weights": str(tmp_path / "stem.safetensors")}), WORDS)
    assert all(torch.equal(stem.state_dict()[name].double(), value.double()) for name, value in parts.items())
    for keys, word in (
        ({"weights": str(tmp_path / "none.pt")}, "is no file"),
        ({"weights": str(tmp_path / "ofa.pt"), "hidden": 48}, "does not fit"),
        ({"text_weights": str(tmp_path / "stem.safetensors")}, "BART"),
    ):
        with pytest.raises(ConfigError, match=word):
            ofa.OFA.build(section().model_copy(update=keys), WORDS)
    with pytest.raises(ValueError, match="holds the text stack"):
        ofa.Config(weights="a", stem_weights="b")

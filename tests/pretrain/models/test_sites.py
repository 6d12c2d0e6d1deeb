"""Sites: the same roles in every kind of tower, and a module put there takes part in the forward."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import vlm
from pretrain.models.cache import Cache
from pretrain.models.sites import replace, sites
from tests import tiny
from tests.pretrain.models import test_ofa as tiny_ofa
from tests.pretrain.models import tiny_vlt5


class Shift(nn.Module):
    """Adds a learned shift behind a module."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.zeros(width))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) + self.shift


def bert_model(tmp_path) -> vlm.VLM:
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    section = tiny.vit_section()
    section.text.name = f"hf:{tmp_path}"
    return tiny.model(section)


@pytest.mark.parametrize("kind", ["native", "bert"])
def test_roles_and_widths(kind: str, tmp_path) -> None:
    model = tiny.model() if kind == "native" else bert_model(tmp_path)
    text = sites(model, tower="text")
    own = {"qkv"} if kind == "native" else {"q", "k", "v"}
    assert {s.role for s in text} == own | {"out", "up", "down", "attention", "mlp"}
    assert {s.layer for s in text} == {0, 1}
    vision = sites(model, tower="vision", roles=("qkv", "up", "mlp"))
    assert [(s.role, s.width) for s in vision[:3]] == [("qkv", 96), ("up", 128), ("mlp", 32)]


@pytest.mark.parametrize("kind", ["native", "bert"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_wrapped_site_is_part_of_the_forward(kind: str, tower: str, tmp_path) -> None:
    model, batch = (tiny.model() if kind == "native" else bert_model(tmp_path)).eval(), tiny.batch()
    before = getattr(model(batch), "image" if tower == "vision" else "text").detach()
    added = [replace(model, s, lambda m, s=s: Shift(m, s.width)) for s in sites(model, tower=tower)]
    after = getattr(model(batch), "image" if tower == "vision" else "text")
    torch.testing.assert_close(after, before)  # a shift of zero changes nothing
    after.sum().backward()
    assert all(a.shift.grad is not None and a.shift.grad.abs().sum() > 0 for a in added)


def encoder_decoder(kind: str) -> tuple[nn.Module, Batch]:
    """Return a model of two stacks in float64, and a batch of text, a decoder's text and pictures."""
    if kind == "ofa":
        return tiny_ofa.model(), tiny_ofa.batch()
    made = tiny_vlt5.model(tiny_vlt5.section(kind, "patch")).double()
    batch = tiny_vlt5.batch(size=32)
    batch.image_NCHW = batch.image_NCHW.double()
    return made, batch


@pytest.mark.parametrize("kind", ["t5", "bart", "ofa"])
def test_encoder_decoders_offer_every_role_in_every_layer(kind: str) -> None:
    """No linear of a layer is left out, and none is offered twice."""
    model, _ = encoder_decoder(kind)
    halves = {"q", "k", "v", "out", "up", "down", "attention", "mlp"}
    cross = {"cross_q", "cross_k", "cross_v", "cross_out", "cross"}
    for tower, roles in (("encoder", halves), ("decoder", halves | cross)):
        found = sites(model, tower=tower)
        assert sorted((s.layer, s.role) for s in found) == sorted((n, role) for n in (0, 1) for role in roles)
        outputs = {s.name for s in found if s.role in ("attention", "mlp", "cross")}
        of = model.text if kind in ("t5", "bart") else model
        prefix = "text." if of is not model else ""
        stack = of.get_submodule(tower)
        layers = stack.block if kind == "t5" else stack.layers
        path = f"{prefix}{tower}.{'block' if kind == 't5' else 'layers'}."
        linears = {f"{path}{name}" for name, part in layers.named_modules() if isinstance(part, nn.Linear)}
        offered = [s.name for s in found if s.role not in ("attention", "mlp", "cross")]
        assert set(offered) == linears and len(offered) == len(linears)
        assert all(s.width == 16 for s in found if s.name in outputs)
    if kind != "ofa":
        assert {s.tower for s in sites(model, tower="vision")} == {"vision"}, "the tower under VL-T5's cells"


@pytest.mark.parametrize(
    "roles",
    [
        ("attention", "mlp", "cross"),
        ("q", "k", "v", "out", "up", "down"),
        ("cross_q", "cross_k", "cross_v", "cross_out"),
    ],
    ids=["outputs", "own", "cross"],
)
@pytest.mark.parametrize("kind", ["t5", "bart", "ofa"])
def test_a_wrapped_site_takes_part_in_encoder_and_decoder(kind: str, roles: tuple[str, ...]) -> None:
    """A shift of zero changes nothing, every shift gets a gradient, and writing word by word says the same."""
    model, batch = encoder_decoder(kind)
    before = model(batch).logits_BUV.detach()
    added = [replace(model, s, lambda m, s=s: Shift(m, s.width).double()) for s in sites(model, roles=roles)]
    after = model(batch).logits_BUV
    torch.testing.assert_close(after, before)
    (after * torch.randn_like(after)).sum().backward()
    idle = ("k", "cross_k")  # a shift of all keys moves every logit of a query alike
    of = [s.role for s in sites(encoder_decoder(kind)[0], roles=roles)]
    assert all(a.shift.grad.abs().sum() > 0 for a, role in zip(added, of, strict=True) if role not in idle)
    with torch.no_grad():
        for one in added:
            one.shift.normal_(std=0.1)
        memory, cache = model.remember(batch), Cache()
        parts = [model.write(part_BU, memory, cache) for part_BU in batch.decoder_tokens_BU.split(2, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(batch).logits_BUV)


def test_convolutions_offer_none() -> None:
    with pytest.raises(ConfigError, match="the vision's layers offer no qkv"):
        sites(tiny.model(tiny.conv_section()), tower="vision", roles=("qkv",))

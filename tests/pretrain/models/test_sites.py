"""Sites: the same roles in every kind of tower, and a module put there takes part in the forward."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from pretrain.config import ConfigError
from pretrain.models import vlm
from pretrain.models.sites import replace, sites
from tests import tiny


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


def test_convolutions_offer_none() -> None:
    with pytest.raises(ConfigError, match="the vision's layers offer no qkv"):
        sites(tiny.model(tiny.conv_section()), tower="vision", roles=("qkv",))

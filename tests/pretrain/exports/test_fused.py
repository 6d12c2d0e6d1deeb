"""Models that fuse leave and come back whole: exported, loaded, built in parts; formats of two towers refuse them."""

import pytest
import torch

from pretrain import export, pretrained, recipe
from pretrain.config import ConfigError
from pretrain.data import synthetic, tokenizer
from pretrain.engine import deferred
from pretrain.models.generate import generate
from pretrain.models.writing import Options
from tests.pretrain.models import fused


def trained(kind: str) -> pretrained.Pretrained:
    """Return a model over a tokenizer trained on captions, which has no mask token of its own."""
    section = fused.section(kind)
    lines = [f"a picture of one {name} on a plain ground" for name in synthetic.CLASSES]
    words = tokenizer.train(lines, 600).extended(section.symbols)
    assert (words.mask is None) == (kind == "coca")
    torch.manual_seed(0)
    state = recipe.build_model(section, words).state_dict()
    return pretrained.build(section, words, state, source="tests")


@pytest.mark.parametrize("kind", ["joint", "coca"])
def test_an_export_of_ours_holds_all(kind: str, tmp_path) -> None:
    model = trained(kind)
    found = export.export(model, tmp_path / "out", format="diptych")
    assert found["text_features"] == 0
    again = pretrained.load(tmp_path / "out")
    assert again.weights_hash == model.weights_hash and again.tokenizer.mask == model.tokenizer.mask
    with pytest.raises(ConfigError, match="it holds two towers"):
        export.export(model, tmp_path / "other", format="hf")
    batch = fused.single(fused.batch(3))
    options = Options(max_tokens=6, beams=2)
    texts = [generate(m.model, batch, options, cached=cached) for m in (model, again) for cached in (True, False)]
    said = [[[one.tokens for one in row] for row in rows] for rows in texts]
    assert said[0] == said[1] == said[2] == said[3]


@pytest.mark.parametrize("kind", ["cross", "joint", "coca"])
def test_built_in_parts_it_is_equal_to_the_bit(kind: str) -> None:
    cls, section = type(fused.model(kind)), fused.section(kind)
    torch.manual_seed(3)
    whole = cls.build(section, fused.WORDS)
    torch.manual_seed(3)
    with deferred.recording() as record:
        parts = cls.build(section, fused.WORDS)
    deferred.materialise(parts, record, lambda _: None)
    state = parts.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())

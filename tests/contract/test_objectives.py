"""Every objective, found by name: finite loss, scalar logs, uses what it owns, names its paper, is refused in time."""

import re

import pytest
import torch

from pretrain import registry
from pretrain.config import ConfigError
from pretrain.objectives import base
from tests import tiny
from tests.pretrain.models import fused
from tests.pretrain.objectives import table

NAMES = registry.names("pretrain.objectives")
PLUGS = {name: registry.find("pretrain.objectives", name) for name in NAMES}
CONTRASTS = [name for name, plug in PLUGS.items() if issubclass(plug.Objective, base.Contrast)]


def example(name: str):
    """Return a model that serves an objective, and a batch for it."""
    needs = set(PLUGS[name].Objective.needs)
    if needs <= {"image", "text"}:
        section = tiny.vit_section()
        section.logit_bias = -10.0
        return tiny.model(section), tiny.batch()
    if "seq2seq" in needs:
        return table.Table(), table.batch([2, 3])
    return fused.model().float(), fused.single(fused.batch())


@pytest.mark.parametrize("name", NAMES)
def test_objective(name: str) -> None:
    plug, (model, batch) = PLUGS[name], example(name)
    mixture = base.build({name: plug.Config()}, model)
    loss, logs = mixture([batch])
    loss.backward()
    assert loss.isfinite()
    assert loss.ndim == 0
    assert all(value.ndim == 0 for value in logs.values())
    assert name in logs
    assert all(p.grad is not None for p in mixture.objectives.parameters()), "an objective must use what it owns"
    assert re.search(r"20\d\d, (\w+, )?arXiv:\d{4}\.\d{5}", plug.__doc__), "name the paper, its year and its number"
    assert set(plug.Objective.needs) <= set(type(model).provides)


@pytest.mark.parametrize("name", CONTRASTS)
def test_equal_captions_are_not_false_negatives(name: str) -> None:
    """With all captions equal, being sure that everything matches is right; told apart, it costs."""
    plug = PLUGS[name]
    batch = tiny.batch()
    batch.caption_B = torch.zeros(len(batch), dtype=torch.long)
    losses = {}
    for equal in (True, False):
        section = plug.Config(equal_captions=equal)
        losses[equal] = base.build({name: section}, tiny.model())([batch])[0].item()
    assert losses[True] != losses[False]


def test_weights_scale_and_add() -> None:
    plug = PLUGS["contrastive"]
    one = base.build({"contrastive": plug.Config()}, tiny.model())([tiny.batch()])[0]
    two = base.build({"contrastive": plug.Config(weight=2.5)}, tiny.model())([tiny.batch()])[0]
    torch.testing.assert_close(two, 2.5 * one)


def test_refusals_come_before_weights() -> None:
    plug = PLUGS["contrastive"]
    with pytest.raises(ConfigError, match=r"contrastive needs \['text'\]"):
        base.refuse_unserved({"contrastive": plug.Config()}, ("image",))
    with pytest.raises(ConfigError, match="name at least one of"):
        base.refuse_unserved({}, ("image",))
    with pytest.raises(ValueError, match="Did you mean 'contrastive'"):
        registry.find("pretrain.objectives", "contrastiv")

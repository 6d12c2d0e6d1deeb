"""Every objective, found by name: finite loss, scalar logs, uses what it owns, names its paper, is refused in time."""

import re

import pytest
import torch

from pretrain import registry
from pretrain.config import ConfigError
from pretrain.models import vlm
from pretrain.objectives import base
from tests import tiny

NAMES = registry.names("pretrain.objectives")


@pytest.mark.parametrize("name", NAMES)
def test_objective(name: str) -> None:
    plug = registry.find("pretrain.objectives", name)
    if not set(plug.Objective.needs) <= set(vlm.VLM.provides):
        pytest.skip(f"two towers do not provide {plug.Objective.needs}")
    section = tiny.vit_section()
    section.logit_bias = -10.0
    model = tiny.model(section)
    mixture = base.build({name: plug.Config()}, model)
    loss, logs = mixture([tiny.batch()])
    loss.backward()
    assert loss.isfinite()
    assert loss.ndim == 0
    assert all(value.ndim == 0 for value in logs.values())
    assert name in logs
    assert all(p.grad is not None for p in mixture.objectives.parameters()), "an objective must use what it owns"
    assert re.search(r"20\d\d, arXiv:\d{4}\.\d{5}", plug.__doc__), "name the paper, its year and its number"
    assert set(plug.Objective.needs) <= set(type(model).provides)


@pytest.mark.parametrize("name", NAMES)
def test_equal_captions_are_not_false_negatives(name: str) -> None:
    """With all captions equal, being sure that everything matches is right; told apart, it costs."""
    plug = registry.find("pretrain.objectives", name)
    if "equal_captions" not in plug.Config.model_fields:
        pytest.skip("compares no captions")
    batch = tiny.batch()
    batch.caption_B = torch.zeros(len(batch), dtype=torch.long)
    losses = {}
    for equal in (True, False):
        section = plug.Config(equal_captions=equal)
        losses[equal] = base.build({name: section}, tiny.model())([batch])[0].item()
    assert losses[True] != losses[False]


def test_weights_scale_and_add() -> None:
    plug = registry.find("pretrain.objectives", "contrastive")
    one = base.build({"contrastive": plug.Config()}, tiny.model())([tiny.batch()])[0]
    two = base.build({"contrastive": plug.Config(weight=2.5)}, tiny.model())([tiny.batch()])[0]
    torch.testing.assert_close(two, 2.5 * one)


def test_refusals_come_before_weights() -> None:
    plug = registry.find("pretrain.objectives", "contrastive")
    with pytest.raises(ConfigError, match=r"contrastive needs \['text'\]"):
        base.refuse_unserved({"contrastive": plug.Config()}, ("image",))
    with pytest.raises(ConfigError, match="name at least one of"):
        base.refuse_unserved({}, ("image",))
    with pytest.raises(ValueError, match="Did you mean 'contrastive'"):
        registry.find("pretrain.objectives", "contrastiv")

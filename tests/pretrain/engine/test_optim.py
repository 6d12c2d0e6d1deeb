"""The learning rate as a function, and which parameters decay."""

import pytest
import torch

from pretrain.config import ConfigError, build
from pretrain.engine import optim
from tests.pretrain.engine.tiny_module import Tiny


def rates(total: int, **keys) -> list[float]:
    config = optim.Config(**keys)
    return [config.learning_rate(step, total) for step in range(total)]


def test_golden_values():
    assert rates(6, lr=1.0, warmup=2) == pytest.approx([0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    assert rates(4, lr=1.0, warmup=2, schedule="constant") == [0.5, 1.0, 1.0, 1.0]
    assert rates(3, lr=1.0, min_lr_ratio=0.1) == pytest.approx([1.0, 0.55, 0.1])
    assert rates(1, lr=1.0) == [1.0]


@pytest.mark.parametrize("warmup", [200, "10%"])
def test_ends_and_peak(warmup):
    values = rates(2000, lr=1e-3, warmup=warmup)
    assert values[0] == pytest.approx(1e-3 / 200) and values[199] == 1e-3 and max(values) == 1e-3
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert values[:200] == sorted(values[:200]) and values[199:] == sorted(values[199:], reverse=True)


@pytest.mark.parametrize(
    ("warmup", "words"),
    [
        (2000, "2000 is 2000 steps, the run has 100"),
        ("100%", "100% is 100 steps"),
        ("ten", "neither a number"),
        (-1, "-1"),
    ],
)
def test_a_warmup_that_makes_no_sense_is_refused(warmup, words):
    with pytest.raises(ConfigError, match=words):
        build(optim.Config, {"warmup": warmup}).learning_rate(0, 100)


def test_gains_biases_and_scalars_do_not_decay_and_frozen_ones_are_left_out():
    module = Tiny()
    decay, keep = optim.groups(module, 0.2)
    assert {p.ndim for p in decay["params"]} == {2} and decay["weight_decay"] == 0.2
    assert {p.ndim for p in keep["params"]} == {1} and keep["weight_decay"] == 0.0
    held = {id(p) for group in (decay, keep) for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="unfreeze"):
        optim.build(Tiny().requires_grad_(False), optim.Config(), device=torch.device("cpu"))

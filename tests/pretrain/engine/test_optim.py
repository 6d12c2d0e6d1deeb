"""The learning rate as a function, and which parameters decay."""

import pytest
import torch

from pretrain.config import ConfigError, build
from pretrain.engine import optim
from tests.pretrain.engine.tiny_module import Tiny, Towers


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
    decay, keep = optim.groups(module, optim.Config(weight_decay=0.2))
    assert {p.ndim for p in decay["params"]} == {2} and decay["weight_decay"] == 0.2
    assert {p.ndim for p in keep["params"]} == {1} and keep["weight_decay"] == 0.0
    held = {id(p) for group in (decay, keep) for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


def test_adamw_in_one_pass_equals_adamw_in_many():
    config = optim.Config(lr=1e-2, weight_decay=0.2)
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Tiny()
        found = optim.build(module, config, device=torch.device("cpu"))
        assert found.defaults["fused"] is True
        if not fused:
            found = torch.optim.AdamW(
                optim.groups(module, config), lr=config.lr, betas=config.betas, eps=config.eps, foreach=False
            )
        for step in range(5):
            for p in module.parameters():
                p.grad = torch.full_like(p, 0.5).mul_(p.detach()).add_(step - 2)
            found.step()
        weights.append([p.detach() for p in module.parameters()])
    for one, many in zip(*weights, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-7)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="unfreeze"):
        optim.build(Tiny().requires_grad_(False), optim.Config(), device=torch.device("cpu"))


def test_layers_get_their_share_of_the_rate_and_all_else_the_whole():
    module = Towers()
    made = optim.build(module, optim.Config(layer_decay={"trunk": 0.5}), device=torch.device("cpu"))
    optim.set_rate(made, 0.8)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    assert named == pytest.approx(
        {"first.weight": 0.2, "first.bias": 0.2, "norm.weight": 0.4, "norm.bias": 0.4,
         "last.weight": 0.8, "last.bias": 0.8, "scale": 0.8}
    )  # fmt: skip
    lines = optim.describe(made.param_groups)
    assert "parameter group trunk layer 0 of 2, decayed: 77 parameters, weight decay 0.2, learning rate x 0.25" in lines
    assert len(lines) == 1 + 2 + 1 + 2 and "the rest, not decayed: 1 parameters" in lines[0]


@pytest.mark.parametrize(("module", "words"), [(Towers(), "Did you mean 'trunk'"), (Tiny(), "It has none")])
def test_a_tower_that_is_not_there_is_refused(module, words):
    with pytest.raises(ConfigError, match=words):
        optim.groups(module, optim.Config(layer_decay={"trunks": 0.5}))


@pytest.mark.parametrize("value", [0, 1.5])
def test_a_layer_decay_that_is_no_share_is_refused(value):
    with pytest.raises(ConfigError, match="no share of the rate"):
        build(optim.Config, {"layer_decay": {"vision": value}})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"warmup": 90}, "takes 90 of 100 steps"),
        ({"warmup": 100}, "the run has 100"),
        ({"lr": 0.01}, "a rate for SGD"),
        ({"lr": 1e-5}, "a rate for fine-tuning"),
        ({"lr": 1e-5, "optimizer": "sgd"}, "a rate for AdamW"),
        ({"layer_decay": {"vision": 0.7}}, "the stem moves least"),
        ({"betas": [0.9, 0.999]}, "loss spikes"),
    ],
)
def test_settings_of_another_regime_are_warned_of(keys, words):
    found = optim.warnings(build(optim.Config, keys), steps=100, batch_size=32768, from_scratch=True)
    assert len(found) == 1 and words in found[0]


def test_the_settings_of_clip_are_not():
    assert optim.warnings(optim.Config(lr=5e-4, warmup=2000), steps=390_000, batch_size=32768, from_scratch=True) == []
    assert optim.warnings(optim.Config(lr=1e-5), steps=100, batch_size=64, from_scratch=False) == []

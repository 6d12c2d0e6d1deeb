"""The recipe of a fine-tuning run: what it fills in, and what it refuses or warns about before weights are read."""

import pytest

from finetune.methods import base, coop, full
from finetune.recipe import Recipe
from pretrain import config
from pretrain.config import ConfigError
from pretrain.engine.optim import Config as Optim


def recipe(method_name: str, /, **sections) -> Recipe:
    tree = {
        "base": "nowhere",
        "run": {"name": "r"},
        "method": {"name": method_name},
        "task": {"name": "few_shot", "data": "x", "templates": ["one {}"]},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return config.build(Recipe, tree)


@pytest.mark.parametrize("method", ["clip_adapter", "tip_adapter", "lora", "full"])
def test_a_method_takes_the_sentences_of_the_task(method):
    assert recipe(method, train={"steps": 1}).method.templates == ["one {}"]
    assert recipe(method, train={"steps": 1}, method={"templates": "icon"}).method.templates == "icon"


def test_lengths_are_the_published_ones():
    lengths = {"cocoop": 10, "clip_adapter": 200, "full": 10}
    assert {name: recipe(name).train.epochs for name in lengths} == lengths
    assert recipe("tip_adapter", method={"train_keys": True}).train.epochs == 20
    assert recipe("tip_adapter").train is None, "nothing trains"
    with pytest.raises(ConfigError, match=r"give exactly one of train\.steps"):
        recipe("lora")  # published by steps, not by epochs


def test_a_warmup_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="20 is 20 steps, the run has 10"):
        recipe("coop", train={"steps": 10}, optim={"warmup": 20})


def test_rates_of_another_regime_are_warned_about():
    assert base.warnings(coop.Method, Optim(optimizer="sgd", lr=0.002)) == []
    [line] = base.warnings(coop.Method, Optim(optimizer="adamw", lr=1e-3))
    assert line == "optim.lr: adamw at 0.001; what is published for this method trains with sgd at 0.0002 to 0.02"
    assert base.warnings(full.Method, Optim(lr=3e-5)) == []
    assert "adamw at 1e-07 to 0.0002 or sgd" in base.warnings(full.Method, Optim(lr=1e-3))[0]

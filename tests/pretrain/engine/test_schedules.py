"""Golden values of every schedule, and the same rates however a run is cut and resumed."""

import pytest

from pretrain.config import ConfigError, build
from pretrain.engine import optim

GOLDEN = {
    "cosine": [0.5, 1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987, 0.0],
    "linear": [0.5, 1.0, 0.833333, 0.666667, 0.5, 0.333333, 0.166667, 0.0],
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "constant_cooldown": [0.5, 1.0, 1.0, 1.0, 1.0, 0.666667, 0.333333, 0.0],
}


def rates(total: int, **keys) -> list[float]:
    config = optim.Config(lr=1.0, **keys)
    return [config.learning_rate(step, total) for step in range(total)]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    assert rates(8, warmup=2, schedule=name, cooldown=3) == pytest.approx(GOLDEN[name], abs=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_cooldown"])
def test_the_floor_is_where_the_run_ends(name):
    found = rates(100, warmup="10%", schedule=name, min_lr_ratio=0.1, cooldown="20%")
    assert found[-1] == pytest.approx(0.1) and min(found[10:]) == found[-1] and found[9] == 1.0
    if name == "constant_cooldown":
        assert found[9:80] == [1.0] * 71 and found[80] < 1


def test_a_run_with_cooldown_is_lengthened_from_any_step_before_it():
    short, long = (rates(n, warmup=5, schedule="constant_cooldown", cooldown=20) for n in (100, 200))
    assert short[:80] == long[:80]
    assert short[80:] == long[180:]


def test_no_cooldown_is_constant():
    assert rates(4, schedule="constant_cooldown", cooldown=0) == [1.0] * 4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"cooldown": -1}, "-1 steps of cool-down"),
        ({"cooldown": "soon"}, "neither a number of steps"),
        ({"cooldown": 95, "warmup": 10}, "95 steps after 10 of warm-up do not fit into a run of 100"),
    ],
)
def test_a_cooldown_that_makes_no_sense_is_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        build(optim.Config, {"schedule": "constant_cooldown", **keys}).learning_rate(0, 100)

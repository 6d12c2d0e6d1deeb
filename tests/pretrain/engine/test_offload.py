"""Masters, moments and weights in the host's memory: same losses, same skips, same checkpoints.

On a CPU host and device are one: that nothing changes can be seen here, that memory is saved only on a GPU.
"""

import pytest

from pretrain.config import ConfigError, build
from pretrain.engine import checkpoint, zero
from pretrain.engine.checkpoint import Checkpoints
from tests.pretrain.engine import test_large_models as large
from tests.pretrain.engine.test_checkpoint import AT_ONCE, PRINT, claimed, state
from tests.pretrain.engine.test_zero import engine, skip_an_infinite_gradient, train

WAYS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_losses_are_those_without(ranks, stage, offload):
    plain = ranks.run(2, large.run, stage)[0]
    assert ranks.run(2, large.run, stage, keys={"offload": offload})[0] == pytest.approx(plain, rel=1e-6)


def skips(stage: int, offload: str) -> None:
    """A gradient that is infinite in one place skips the step on all ranks; a checkpoint goes both ways."""
    made = engine(stage, keys={"offload": offload})
    try:
        skip_an_infinite_gradient(made)
        assert train(made, 0, 1) and made.optimizer_step() == 1
    finally:
        made.close()


@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_an_infinite_gradient_skips_the_step_on_all(ranks, stage, offload):
    ranks.run(2, skips, stage, offload)


def save(root: str, stage: int, offload: str) -> list[float]:
    made = engine(stage, keys={"offload": offload})
    try:
        train(made, 0, 2)
        Checkpoints(claimed(root), AT_ONCE).save(made, state(2))
        return train(made, 2, 5)
    finally:
        made.close()


def go_on(root: str, stage: int, offload: str) -> list[float]:
    made = engine(stage, keys={"offload": offload}, seed=1)
    try:
        Checkpoints(claimed(root), build(checkpoint.Config, {})).restore(made, fingerprint=PRINT)
        return train(made, 2, 5)
    finally:
        made.close()


@pytest.mark.parametrize(
    ("before", "after"), [((1, "none"), (3, "all")), ((3, "all"), (1, "optimizer")), ((2, "optimizer"), (2, "none"))]
)
def test_a_checkpoint_does_not_know_where_the_states_lay(ranks, tmp_path, before, after):
    losses = ranks.run(2, save, str(tmp_path), *before)[0]
    assert ranks.run(2, go_on, str(tmp_path), *after)[0] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"stage": 0, "offload": "optimizer"}, "needs zero.stage=1 or higher"),
        ({"stage": 2, "offload": "all"}, "needs zero.stage=3"),
        ({"extra": {"zero_optimization": {"offload_param": {}}}}, "zero.offload; leave it out"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        build(zero.Config, keys)

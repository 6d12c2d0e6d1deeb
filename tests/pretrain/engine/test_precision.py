"""fp16's loss scale: an overflow skips the step on all ranks, at every stage, and is remembered by a checkpoint."""

import pytest
import torch

from pretrain import dist
from pretrain.engine.precision import Autocast, LossScale
from tests.pretrain.engine.test_zero import engine, skip_an_infinite_gradient
from tests.pretrain.engine.tiny_module import batch


def test_scale_halves_at_once_and_doubles_after_patience():
    scale = LossScale(scale=8.0, patience=2)
    scale.update(overflow=True)
    assert scale.state() == {"scale": 4.0, "good": 0}
    scale.update(overflow=False)
    again = LossScale(patience=2)
    again.restore(scale.state())
    again.update(overflow=False)
    assert again.state() == {"scale": 8.0, "good": 0}
    tiny = LossScale(scale=1.0)
    tiny.update(overflow=True)
    assert tiny.scale == 1.0


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_only_the_arithmetic_is_lowered(precision, dtype):
    wrapped = Autocast(torch.nn.Linear(2, 2), precision, device_type="cpu")
    assert wrapped(torch.ones(1, 2)).dtype == dtype
    assert wrapped.module.weight.dtype == torch.float32


def overflow(stage: int) -> None:
    """Rank 0 alone overflows at its first step."""
    made = engine(stage, "fp16")
    try:
        before = [f.weight.clone() for f in made.fragments()]
        loss, _ = made([batch(0, dist.rank(), dist.world())])
        made.backward(loss * (1e36 if dist.rank() == 0 else 1.0))
        assert made.step(0.1) == float("inf")
        assert made.loss_scale.scale == 2.0**15 and made.optimizer_step() == 0
        assert all(torch.equal(a, f.weight) for a, f in zip(before, made.fragments()))
        loss, _ = made([batch(0, dist.rank(), dist.world())])
        made.backward(loss)
        assert 0 < made.step(0.1) < 100  # unscaled before it is clipped and reported
        assert made.optimizer_step() == 1
        assert not all(torch.equal(a, f.weight) for a, f in zip(before, made.fragments()))
    finally:
        made.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks, stage):
    ranks.run(2, overflow, stage)


def infinite_in_one_place(stage: int) -> None:
    """In fp32 one parameter's gradient is infinite: at stages 1 to 3 only some ranks hold it."""
    made = engine(stage, "fp32")
    try:
        skip_an_infinite_gradient(made)
        made.backward(made([batch(0, dist.rank(), dist.world())])[0])
        assert 0 < made.step(0.1) < 100 and made.optimizer_step() == 1
    finally:
        made.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_infinite_gradient_in_fp32_skips_the_step_on_all(ranks, stage):
    ranks.run(2, infinite_in_one_place, stage)


def half_losses(stage: int, precision: str) -> list[float]:
    from tests.pretrain.engine.test_zero import losses_of

    return losses_of(stage, precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_at_every_stage(ranks, precision):
    first, *others = [ranks.run(2, half_losses, stage, precision)[0] for stage in range(4)]
    exact = ranks.run(2, half_losses, 0, "fp32")[0]
    assert first == pytest.approx(exact, rel=0.05) and first != exact
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-3)

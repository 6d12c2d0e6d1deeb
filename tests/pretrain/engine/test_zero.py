"""The same losses at every ZeRO stage and world size."""

import pytest
import torch
from torch import nn

from pretrain import dist
from pretrain.engine import deferred, ema, optim, zero
from tests.pretrain.engine.tiny_module import Tiny, Towers, batch

OPTIM = optim.Config(lr=0.02, weight_decay=0.1, grad_clip=1.0)


def engine(
    stage: int,
    precision: str = "fp32",
    *,
    module: nn.Module | None = None,
    section: optim.Config = OPTIM,
    keys: dict | None = None,
    average: ema.Config | None = None,
    record: deferred.Record | None = None,
    **kw,
) -> zero.Engine:
    """Return an engine over Tiny, or another module; `keys` are more of the zero section."""
    return zero.Engine(
        module or Tiny(**kw),
        zero.Config(stage=stage, **(keys or {})),
        optim_config=section,
        precision=precision,
        rows=8 // dist.world(),
        device=torch.device("cpu"),
        average=average,
        record=record,
    )


def train(made: zero.Engine, first: int, last: int, *, evaluate: bool = False) -> list[float]:
    """Return the global losses of steps first .. last - 1."""
    losses = []
    for step in range(first, last):
        loss, _ = made([batch(step, dist.rank(), dist.world())])
        made.backward(loss)
        made.step(0.02 / (1 + step))
        losses.append(dist.mean(loss).item())
        if evaluate:
            with made.evaluating() as module:
                module.features(torch.ones(2, 7))
    return losses


def skip_an_infinite_gradient(made: zero.Engine) -> None:
    """Run on every rank: a gradient that is infinite in one place changes no weight on any rank."""
    before = [f.weight.clone() for f in made.fragments()]
    hook = made.module.scale.register_hook(lambda grad: grad * float("inf"))
    made.backward(made([batch(0, dist.rank(), dist.world())])[0])
    assert made.step(0.1) == float("inf") and made.optimizer_step() == 0
    assert all(torch.equal(a, f.weight) for a, f in zip(before, made.fragments()))
    hook.remove()


def losses_of(stage: int, precision: str = "fp32", *, evaluate: bool = False) -> list[float]:
    """Run on every rank: five steps."""
    made = engine(stage, precision)
    try:
        return train(made, 0, 5, evaluate=evaluate)
    finally:
        made.close()


@pytest.fixture(scope="module")
def reference(ranks) -> list[float]:
    """The losses of one process at stage 0."""
    return ranks.run(1, losses_of, 0)[0]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_do_not_depend_on_stage_and_world(ranks, reference, stage, world):
    for losses in ranks.run(world, losses_of, stage, evaluate=True):
        assert losses == pytest.approx(reference, rel=1e-5)
    assert reference[-1] < reference[0]


def trained_by_layers(stage: int) -> list[float]:
    """Run on every rank: five steps with layer-wise decay; the rates stay those of their groups."""
    made = engine(stage, module=Towers(), section=OPTIM.model_copy(update={"layer_decay": {"trunk": 0.1}}))
    try:
        losses = train(made, 0, 5)
        rates = {g["name"]: g["lr"] for g in made.torch_optimizer.param_groups}
        assert rates["trunk layer 0 of 2, decayed"] == pytest.approx(0.01 * rates["the rest, not decayed"])
        return losses
    finally:
        made.close()


def test_layer_decay_holds_at_every_stage(ranks, reference):
    first, *others = [ranks.run(2, trained_by_layers, stage)[0] for stage in range(4)]
    assert first[0] == pytest.approx(reference[0]) and first[-1] != pytest.approx(reference[-1], rel=1e-2)
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-5)

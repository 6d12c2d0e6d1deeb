"""Objectives that fuse, over ranks: two with unequal texts are one with both, in micro-batches too, at every stage."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from pretrain import dist, registry
from pretrain.batch import Batch
from pretrain.engine import accumulate, optim, zero
from pretrain.objectives import base
from tests.pretrain.engine.test_accumulate import Alone
from tests.pretrain.models import fused

ROWS = 8
UNIVL = {"contrastive": {}, "matching": {"among": 2}, "mixed_lm": {"share": 0.4}}
COCA = {"contrastive": {}, "captioning": {"weight": 2.0}}
ALL = {**UNIVL, "masked_lm": {"share": 0.4}, "prefix_lm": {}, "captioning": {}}


def mixture(kind: str, sections: dict) -> base.Mixture:
    """Return a tiny model under the named objectives."""
    plugs = {name: registry.find("pretrain.objectives", name) for name in sections}
    made = {name: plugs[name].Config(**keys) for name, keys in sections.items()}
    return base.build(made, fused.model(kind))


def rows(seed: int) -> Batch:
    """Return this rank's rows of a step, its texts no longer than they need be: they differ in length between ranks."""
    mine = fused.batch(ROWS, length=12, shortest=4, seed=seed).split(ROWS // dist.world())[dist.rank()]
    length = int(mine.valid_BT.sum(1).max())
    for name in ("tokens_BT", "blocks_BT", "valid_BT", "labels_BT"):
        setattr(mine, name, getattr(mine, name)[:, :length])
    return mine


def in_double(kind: str, sections: dict, micro: int | None) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Return loss, scalars and gradients of a step, all ranks' together."""
    with mock.patch.object(Tensor, "float", Tensor.double):  # what lifts half precision must not lower this
        module = mixture(kind, sections).double()
        made = Alone(module)
        logs, loss = accumulate.Steps(made, rows=micro, seed=5)(rows(2), 1, lambda loss: loss.detach())
        grads = {n: dist.mean(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in module.named_parameters()}
        return float(dist.mean(loss)), {name: float(dist.mean(value.double())) for name, value in logs.items()}, grads


@pytest.mark.parametrize(
    ("kind", "sections"),
    [("cross", ALL), ("joint", UNIVL), ("coca", COCA)],
    ids=["cross", "joint", "coca"],
)
def test_two_ranks_are_one(ranks, kind, sections):
    loss, logs, grads = ranks.run(1, in_double, kind, sections, None)[0]
    assert {name for name, grad in grads.items() if not grad.any()} <= {"model.vision.trunk.cls_token"}
    for world, micro in ((2, None), (1, 2), (2, 2)):
        for loss_k, logs_k, grads_k in ranks.run(world, in_double, kind, sections, micro):
            assert loss_k == pytest.approx(loss, rel=1e-12)
            assert logs_k.keys() == logs.keys()
            for name, value in logs.items():
                assert logs_k[name] == pytest.approx(value, rel=1e-11, abs=1e-12), (name, world, micro)
            for name, grad in grads.items():
                apart = float((grads_k[name] - grad).abs().max())
                assert apart <= 1e-11 * max(1.0, float(grad.abs().max())), (name, world, micro)


def steps(kind: str, sections: dict, stage: int, micro: int | None) -> list[float]:
    """Return the global losses of three steps in single precision; one rank has no pictures in the second."""
    module = mixture(kind, sections).float()
    made = zero.Engine(
        module,
        zero.Config(stage=stage),
        optim_config=optim.Config(lr=1e-2, grad_clip=1.0),
        precision="fp32",
        rows=ROWS // dist.world(),
        device=torch.device("cpu"),
    )
    try:
        run, found = accumulate.Steps(made, rows=micro, seed=5), []
        for step in range(3):
            batch = fused.single(rows(step))
            if step == 1 and dist.rank() == 1 and not {"contrastive", "matching"} & set(sections):
                batch.image_NCHW = batch.owner_N = None
            _, loss = run(batch, step, lambda loss: loss.detach())
            made.step(1e-2)
            found.append(dist.mean(loss).item())
        return found
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("cross", UNIVL),
        pytest.param("joint", UNIVL, marks=pytest.mark.slow),
        pytest.param("coca", COCA, marks=pytest.mark.slow),
        ("joint", {"mixed_lm": {}}),
    ],
    ids=["cross", "joint", "coca", "words"],
)
def test_every_stage_takes_the_same_steps(ranks, kind, sections):
    expected = ranks.run(2, steps, kind, sections, 0, None)[0]
    assert len(set(expected)) == 3
    for stage, micro in ((1, None), (2, 2), (3, None), (3, 2)):
        found = ranks.run(2, steps, kind, sections, stage, micro)[0]
        assert found == pytest.approx(expected, rel=2e-5), (stage, micro)

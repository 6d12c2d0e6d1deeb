"""Whole runs of models that fuse: any ranks, any stage, in micro-batches, interrupted: the same losses."""

import pytest

from tests import tiny
from tests.end_to_end.jobs import FEW_STEPS, losses, losses_of, pretrain

UNIVL = (
    "model.fusion={kind: joint, layers: 1}",
    "objectives={contrastive: {}, matching: {among: 4}, mixed_lm: {}, prefix_lm: {}}",
)
COCA = (
    "model.name=coca",
    "model.fusion={layers: 1}",
    "model.queries=4",
    "objectives={contrastive: {}, captioning: {}}",
)


@pytest.mark.slow
@pytest.mark.parametrize("words", [UNIVL, pytest.param(COCA, marks=pytest.mark.slow)], ids=["univl", "coca"])
def test_a_run_is_the_same_on_any_ranks(ranks, words, tmp_path) -> None:
    file = tiny.config_file(tmp_path)
    expected = losses_of(ranks, 1, file, "one", *FEW_STEPS, *words)
    for name, world, more in (("two", 2, ("zero.stage=3",)), ("parts", 1, ("train.micro_batch_size=8",))):
        found = losses_of(ranks, world, file, name, *FEW_STEPS, *words, *more)
        assert found == pytest.approx(expected, rel=1e-4), name
    run = tmp_path / "runs" / "stopped"
    half = tuple(word for word in FEW_STEPS if not word.startswith("train.steps"))
    schedule = ("run.name=stopped", "optim.schedule=constant", *words)
    ranks.run(1, pretrain, file, *half, *schedule, "train.steps=4")
    ranks.run(2, pretrain, file, *half, *schedule, "train.steps=8", "zero.stage=2")
    straight = losses_of(ranks, 1, file, "straight", *FEW_STEPS, "optim.schedule=constant", *words)
    assert losses(run) == pytest.approx(straight, rel=1e-4)

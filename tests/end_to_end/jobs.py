"""Whole pretraining runs as functions that a pool of ranks can call."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from pretrain import config, main
from pretrain.batch import Batch
from pretrain.data.loader import Loader
from pretrain.recipe import Recipe
from tests.end_to_end.killer import written
from tests.ranks import Pool

#: of any config, for a run that is looked at step by step and soon over
FEW_STEPS = ("train.steps=8", "optim.warmup=2", "monitor.log_every=1", "evals={}", "monitor.tensorboard=false")


def pretrain(file: Path, *words: str) -> int:
    """Run pretraining on this rank as pretrain/main.py would; return its exit code."""
    return main.train(config.load(Recipe, file, words), torch.device("cpu"))


def pretrain_and_tell(file: Path, *words: str) -> list[list[tuple[str, int]]]:
    """Pretrain on this rank; return (key, draw) of the rows of every batch that it has trained on."""
    seen = []
    iterate = Loader.iterate

    def telling(loader: Loader, start: int = 0) -> Iterator[Batch]:
        for batch in iterate(loader, start):
            seen.append(list(zip(batch.keys, batch.draw_B.tolist())))
            yield batch

    with mock.patch.object(Loader, "iterate", telling):
        assert pretrain(file, *words) == 0
    return seen


def losses(run: Path) -> dict[int, float]:
    """Return the loss of every step that metrics.jsonl holds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step is reported twice"
    return {line["step"]: line["loss"] for line in lines}


def steps_done(run: Path) -> int:
    """Return the last step that the run has reported: one line a step."""
    return written(run / "metrics.jsonl")


def losses_of(ranks: Pool, world: int, file: Path, name: str, *words: str) -> dict[int, float]:
    """Pretrain as run `name`, beside its config `file`, on `world` ranks of the pool; return the loss of every step."""
    ranks.run(world, pretrain, file, f"run.name={name}", *words)
    return losses(file.parent / "runs" / name)

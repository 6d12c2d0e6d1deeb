"""A whole training run of Tiny, as a function for the pool and as a script for real launchers.

deepspeed --num_gpus 2 tests/pretrain/engine/tiny_run.py FOLDER [key=value ...]
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # a launcher puts this folder first

import torch

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError, Section, build, exit_with, override
from pretrain.data.excluded import Excluded
from pretrain.engine import parts, process, trainer
from pretrain.engine.checkpoint import Config as Checkpoint
from pretrain.engine.deepspeed_config import Config as Zero
from pretrain.engine.monitor import Config as Monitor
from pretrain.engine.optim import Config as Optim
from pretrain.engine.rollback import Config as Faults
from pretrain.engine.run_folder import RunFolder
from pretrain.engine.steps import Config as Train
from pretrain.engine.stragglers import Config as Stragglers
from pretrain.engine.watchdog import Config as Watchdog
from tests import trouble
from tests.pretrain.engine import tiny_module

DEFAULTS: dict[str, Any] = {
    "train": {"steps": 8, "batch_size": 8},
    "optim": {"lr": 0.02, "warmup": 2},
    "checkpoint": {"every_steps": 3},
    "monitor": {"log_every": 1, "tensorboard": False},
}


class Recipe(Section):
    """The sections that the trainer reads, and switches that make trouble."""

    train: Train
    optim: Optim
    zero: Zero = Zero()
    checkpoint: Checkpoint
    monitor: Monitor
    faults: Faults = Faults()
    watchdog: Watchdog = Watchdog()
    stragglers: Stragglers = Stragglers()
    seed: int = 0  #: of the weights
    order: int = 0  #: a key that a resume must not change
    pause: float = 0.0  #: seconds a batch
    nan_at: list[int] = []  # noqa: RUF012  #: batches that hold not-a-number on the last rank
    huge_at: int = -1  #: batch whose values are ten times too large
    slow_rank: float = 0.0  #: seconds by which the last rank is slower, a batch
    slow_start: float = 0.0  #: seconds that the first batch takes
    slow_hook: float = 0.0  #: seconds that a hook takes
    bad_at: int = -1  #: step index at which the last rank reports a replaced sample
    signal_at: int = -1  #: step index at which the last rank gets SIGTERM
    hang_at: int = -1  #: step index in whose forward the last rank falls asleep
    kill_at: int = -1  #: step index at which the last rank is killed, as kill -9 does


def batches(recipe: Recipe, first: int, out: Excluded) -> Iterator[Batch]:
    """Yield this rank's rows from step `first` on, without what is left out."""
    last = dist.rank() == dist.world() - 1
    for number in range(first, 10**9):
        step = out.batch_at(number)
        time.sleep(recipe.pause + recipe.slow_rank * last + recipe.slow_start * (number == first))
        found = tiny_module.batch(step, dist.rank(), dist.world(), recipe.train.batch_size)
        if last and step == recipe.signal_at:
            os.kill(os.getpid(), 15)
        if last and step == recipe.kill_at:
            os.kill(os.getpid(), 9)
        if step == recipe.huge_at:
            found.image_NCHW *= 10
        if last and step in recipe.nan_at:
            found.image_NCHW[0] = float("nan")
        if last and step == recipe.bad_at:
            found.bad = [{"shard": "a.tar", "key": "k", "reason": "torn"}]
        yield found


def run(folder: str, *words: str, device: str | torch.device = "cpu") -> tuple[int, list[Any]]:
    """Train; return the exit code and what the hooks saw."""
    recipe = build(Recipe, override(DEFAULTS, words))
    seen: list[Any] = []
    out = [Excluded()]

    def restore(state: dict[str, Any]) -> None:
        seen.append(("restored", state["position"]))
        out.append(Excluded.restore(state))

    def hook(step: int) -> None:
        time.sleep(recipe.slow_hook)
        seen.append(("hook", step, made.engine.module.training))

    run_folder = RunFolder(folder, config="seed: 0\n")
    module = tiny_module.Tiny(recipe.seed)
    if dist.rank() == dist.world() - 1 and recipe.hang_at >= 0:
        trouble.hang(module, recipe.hang_at)
    made = trainer.Trainer(
        module,
        recipe,
        folder=run_folder,
        device=torch.device(device),
        steps=recipe.train.total_steps(100),
        data=parts.Data(
            batches=lambda first: batches(recipe, first, out[-1]),
            state=lambda step: {"position": step, **out[-1].state()},
            restore=restore,
            exclude=lambda numbers: out.append(out[-1].without(batches=numbers)),
            batch_at=lambda step: out[-1].batch_at(step),
            on_bad=lambda batch, step: seen.append(("bad", step, len(batch.bad))),
        ),
        identity=parts.Identity(
            fingerprint={"order": {"seed": recipe.order}}, optimisation={"optim": {"lr": recipe.optim.lr}}
        ),
        hooks=[parts.Hook(hook, 4)],
    )
    try:
        return made.run(), seen
    finally:
        made.close()


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if not w.startswith("--local_rank")]
    try:
        place = process.setup_process_group()
        code, _ = run(words[0], *words[1:], device=place)
    except (ConfigError, RuntimeError) as error:
        exit_with(error, code=1)
    process.shutdown()
    raise SystemExit(code)

"""The training loop: data, forward, agreement of the ranks, backward, step, and what is due after it."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as torch_dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.engine import checkpoint, ema, monitor, optim, zero
from pretrain.engine.precision import Precision
from pretrain.engine.preemption import EXIT_INTERRUPTED, EXIT_REQUEUE, Preemption
from pretrain.engine.run_folder import RunFolder
from pretrain.models import blocks


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why and what to do."""


class Config(Section):
    """The `train:` section."""

    steps: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(256, ge=1)  #: of all ranks together
    precision: Precision = "fp32"
    compile: bool = False  #: torch.compile of every block of the towers; the first step takes a minute or more

    @model_validator(mode="after")
    def _one_length(self) -> "Config":
        given = [n for n in ("steps", "samples", "epochs") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, samples, epochs (got {', '.join(given) or 'none'})")
        return self

    def total_steps(self, samples_per_epoch: int) -> int:
        """Return the length of the run in steps of the global batch, rounded up.

        Raises:
            ConfigError: no sample to train on.
        """
        if self.steps is not None:
            return self.steps
        if self.samples is None and samples_per_epoch < 1:
            raise ConfigError("train: the data has no samples; check data.shards")
        samples = self.samples if self.samples is not None else float(self.epochs or 0) * samples_per_epoch
        return max(1, math.ceil(samples / self.batch_size))

    def rows_per_rank(self) -> int:
        """Return the batch size of one rank.

        Raises:
            ConfigError: the ranks do not divide the batch.
        """
        rows, rest = divmod(self.batch_size, dist.world())
        if rest or not rows:
            near = dist.world() * max(1, rows)
            raise ConfigError(
                f"train.batch_size: {self.batch_size} is not divisible by {dist.world()} ranks; try {near}"
            )
        return rows


class Sections(Protocol):
    """The sections of the whole config that the trainer reads."""

    train: Config
    optim: optim.Config
    zero: zero.Config
    checkpoint: checkpoint.Config
    monitor: monitor.Config


class Hook(NamedTuple):
    """Something to do every few steps and at the last, on all ranks, with the module in eval mode without gradients."""

    call: Callable[[int], None]  #: gets the number of steps done
    every: int


@dataclass(kw_only=True)
class Data:
    """How the trainer gets its batches and what a checkpoint keeps of them."""

    batches: Callable[[int], Iterator[Batch]]  #: first step (from 0) -> this rank's rows of that and the next steps
    state: Callable[[int], dict[str, Any]] = lambda step: {}  #: steps done -> what a checkpoint keeps
    restore: Callable[[dict[str, Any]], None] = lambda state: None  #: gets it back before `batches` is called
    #: called on all ranks, before the update, at steps where some rank's batch has replaced samples (`Batch.bad`)
    on_bad: Callable[[Batch, int], None] = lambda batch, step: None


@dataclass(kw_only=True)
class Identity:
    """What a checkpoint belongs to."""

    fingerprint: dict[str, Any] = field(default_factory=dict)  #: {"order": ..., "architecture": ...}: must be equal
    optimisation: dict[str, Any] = field(default_factory=dict)  #: may change between starts, with a warning


class Trainer:
    """Trains a module whose `forward(batches)` returns (loss, dict of scalars); resumes where a checkpoint stopped."""

    def __init__(
        self,
        module: nn.Module,
        sections: Sections,
        *,
        folder: RunFolder,
        data: Data,
        steps: int,
        device: torch.device,
        seed: int = 0,
        identity: Identity | None = None,
        hooks: Sequence[Hook] = (),
        average: ema.Config | None = None,
        speed: monitor.Speed | None = None,
    ) -> None:
        """Build the engine and resume. All ranks call it.

        Raises:
            ConfigError: sections that contradict each other, or a checkpoint of another architecture or order.
        """
        self.sections = sections
        self.data = data
        self.steps = steps
        self.device = device
        self.seed = seed
        self.folder = folder
        self.identity = identity or Identity()
        self.hooks = list(hooks)
        self.rows = sections.train.rows_per_rank()
        sections.optim.warmup_steps(steps)
        if sections.train.compile:
            blocks.compile_all(module)
        self.engine = zero.Engine(
            module,
            sections.zero,
            optim_config=sections.optim,
            precision=sections.train.precision,
            rows=self.rows,
            device=device,
            keep_frozen=sections.checkpoint.frozen,
            average=average,
        )
        self.checkpoints = checkpoint.Checkpoints(folder, sections.checkpoint)
        state = self.checkpoints.restore(self.engine, fingerprint=self.identity.fingerprint)
        self.start = int(state["step"]) if state else 0
        folder.claim()
        if dist.is_main():
            monitor.truncate(folder.path / "evals.jsonl", self.start)
        self.monitor = monitor.Monitor(
            sections.monitor,
            folder.path,
            steps=steps,
            start=self.start,
            device=device,
            batch_size=sections.train.batch_size,
            speed=speed,
            save_every=sections.checkpoint.every_steps,
        )
        for line in self.engine.groups if sections.optim.layer_decay else ():
            self.monitor.say(line)
        if state:
            self._announce(state)
            data.restore(state["data"])
        self._saved = self.start if state else -1
        self._owed = bool(state and state["hooks_owed"])
        self._saved_at = time.monotonic()

    def _announce(self, state: dict[str, Any]) -> None:
        self.monitor.say(f"resumed from {state['path']}: {self.start} of {self.steps} steps are done")
        before = dict(checkpoint.flatten(state.get("optimisation") or {}))
        after = dict(checkpoint.flatten(self.identity.optimisation))
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                change = f"{key} was {before.get(key)!r}, is {after.get(key)!r} from here on"
                self.monitor.say(f"warning: {change}", level=logging.WARNING)

    def run(self) -> int:
        """Train to the end; return the exit code: 0, or EXIT_REQUEUE / EXIT_INTERRUPTED after a save.

        Raises:
            TrainingError: a loss or gradient that is not finite.
            checkpoint.CheckpointError: a checkpoint could not be written.
        """
        with Preemption() as preemption:
            try:
                return self._run(preemption)
            finally:
                self.monitor.close()

    def _run(self, preemption: Preemption) -> int:
        if self._owed:
            self._call_hooks(self.start)
        batches = self.data.batches(self.start) if self.start < self.steps else iter(())
        for index in range(self.start, self.steps):
            agreed = self._step(index, batches, preemption)
            done = index + 1
            if agreed.requeue or agreed.interrupted:
                self.save(done, hooks_owed=True)
                self.monitor.say(f"stopped by a signal after step {done}; start the same command again to go on")
                return EXIT_INTERRUPTED if agreed.interrupted else EXIT_REQUEUE
            self._call_hooks(done)
            if agreed.save or done % (self.sections.checkpoint.every_steps or done + 1) == 0:
                self.save(done)
            if done == self.start + 2:
                gc.freeze()  # what lives now lives to the end: later collections skip it
        if self._saved < self.steps:
            self.save(self.steps)
        return 0

    def _call_hooks(self, done: int) -> None:
        for hook in self.hooks:
            if done % hook.every == 0 or done == self.steps:
                with self.engine.evaluating():
                    hook.call(done)

    def _step(self, index: int, batches: Iterator[Batch], preemption: Preemption) -> "Agreed":
        """Run step `index`; return what the ranks agreed on."""
        began = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            raise TrainingError(f"step {index + 1}: the data ended; data must go on for {self.steps} steps") from None
        waited = time.perf_counter() - began
        dist.seed_step(self.seed, index, dist.rank())
        loss, logs = self.engine([batch.to(self.device)])
        # launched before backward, read after it: the wait is hidden
        agreement = Agreement(loss, batch, preemption, save=self._minutes_are_over())
        self.engine.backward(loss)
        agreed = agreement.read()
        if agreed.bad:
            self.data.on_bad(batch, index)
        if agreed.broken:
            raise TrainingError(
                f"step {index + 1}: the loss is not finite on {agreed.broken} of {dist.world()} ranks; "
                "lower optim.lr, lengthen optim.warmup or use train.precision=bf16. The last checkpoint is intact"
            )
        lr = self.sections.optim.learning_rate(index, self.steps)
        norm = self.engine.step(lr)
        if not math.isfinite(norm) and self.engine.loss_scale is None:
            raise TrainingError(
                f"step {index + 1}: the gradient is not finite although the loss is {agreed.loss:.4g}; "
                "lower optim.lr or set optim.grad_clip. The last checkpoint is intact"
            )
        scalars = {"loss": agreed.loss, "lr": lr, "grad_norm": norm}
        if self.engine.loss_scale is not None:
            scalars["loss_scale"] = self.engine.loss_scale.scale
        if self.monitor.due(index + 1):
            scalars = {**mean_logs(logs), **scalars}
        self.monitor.record(index + 1, seconds=time.perf_counter() - began, data_wait=waited, scalars=scalars)
        return agreed

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.engine.close()

    def _minutes_are_over(self) -> bool:
        minutes = self.sections.checkpoint.every_minutes  # rank 0's clock decides for all
        return dist.is_main() and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, done: int, *, hooks_owed: bool = False) -> None:
        """Write a checkpoint after `done` steps; all ranks call it. Owed hooks are called by the next start."""
        state = {
            "step": done,
            "hooks_owed": hooks_owed,
            "data": self.data.state(done),
            "fingerprint": self.identity.fingerprint,
            "optimisation": self.identity.optimisation,
            "incarnation": self.folder.token,
        }
        self.checkpoints.save(self.engine, state)
        self._saved, self._saved_at = done, time.monotonic()


class Agreed(NamedTuple):
    """What all ranks know of a step."""

    loss: float  #: mean over ranks
    broken: int  #: ranks whose loss is not finite
    bad: int  #: replaced samples
    requeue: int  #: ranks that were asked to stop and be started again
    interrupted: int  #: ranks that saw a Ctrl-C
    save: int  #: checkpoint.every_minutes are over


class Agreement:
    """One small all-reduce a step, by which ranks share the loss and decide together to stop."""

    def __init__(self, loss: Tensor, batch: Batch, preemption: Preemption, *, save: bool) -> None:
        value = loss.detach().double().reshape(1)
        finite = value.isfinite()
        facts = [len(batch.bad), preemption.requeue, preemption.interrupted, save]
        rest = torch.tensor(facts, dtype=torch.float64).to(value.device, non_blocking=True)
        self._word = torch.cat([torch.where(finite, value, 0.0), (~finite).double(), rest])
        self._work = torch_dist.all_reduce(self._word, async_op=True) if dist.world() > 1 else None

    def read(self) -> Agreed:
        """Wait for the ranks."""
        if self._work is not None:
            self._work.wait()
        loss, *counts = self._word.tolist()
        return Agreed(loss / dist.world(), *(int(c) for c in counts))


def mean_logs(logs: dict[str, Tensor]) -> dict[str, float]:
    """Return each scalar's mean over ranks (the names must be the same on all ranks)."""
    if not logs:
        return {}
    names = sorted(logs)
    values = dist.mean(torch.stack([logs[n].detach().double().reshape(()) for n in names]))
    return dict(zip(names, values.tolist()))

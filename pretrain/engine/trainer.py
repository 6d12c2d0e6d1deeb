"""The training loop: data, forward, agreement of the ranks, backward, step, and what is due after it."""

import gc
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import dist
from pretrain.batch import Batch
from pretrain.data.quarantine import TooManyBad
from pretrain.engine import accumulate, checkpoint, deferred, ema, journal, monitor, watchdog, zero
from pretrain.engine.agreement import Agreed, Agreement
from pretrain.engine.parts import Data, Hook, Identity, Sections
from pretrain.engine.preemption import EXIT_INTERRUPTED, EXIT_REQUEUE, Preemption
from pretrain.engine.recovery import Recovery, TrainingError
from pretrain.engine.rollback import Trouble
from pretrain.engine.run_folder import RunFolder, StaleRunError
from pretrain.engine.stragglers import Stragglers
from pretrain.models import blocks


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
        record: deferred.Record | None = None,
        speed: monitor.Speed | None = None,
    ) -> None:
        """Build the engine and resume. All ranks call it.

        Raises:
            ConfigError: sections that contradict each other, or a checkpoint of another architecture or order.
        """
        self.sections = sections
        self.data = data
        self.steps, self.device, self.seed = steps, device, seed
        self.folder = folder
        self.identity = identity or Identity()
        self.hooks = list(hooks)
        self.speed = speed
        self.rows = sections.train.rows_per_rank()
        sections.optim.learning_rate(0, steps)  # a schedule that does not fit is refused before anything is built
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
            record=record,
        )
        self.gradients = accumulate.Steps(self.engine, rows=sections.train.micro_batch_size, seed=seed)
        self.checkpoints = checkpoint.Checkpoints(folder, sections.checkpoint)
        state = self.checkpoints.restore(self.engine, fingerprint=self.identity.fingerprint)
        self.start = int(state["step"]) if state else 0
        folder.claim()
        fresh = sections.checkpoint.resume == "none"
        self.recovery = Recovery(
            sections.faults, folder, module=module, data=data, checkpoints=self.checkpoints, fresh=fresh
        )
        self.watchdog = watchdog.Watchdog(sections.watchdog, folder)
        self.stragglers = Stragglers(sections.stragglers, device)
        self.monitor = self._monitor(self.start)
        for line in self.engine.groups if sections.optim.layer_decay else ():
            self.monitor.say(line)
        if state:
            self._announce(state)
            data.restore(state["data"])
            self.recovery.faults.restore(state.get("faults") or {})
        self.recovery.leave_out(self.start)
        self._saved = self.start if state else -1
        self._owed = bool(state and state["hooks_owed"])
        self._saved_at = time.monotonic()

    def _monitor(self, start: int) -> monitor.Monitor:
        """Return what writes metrics from step `start` on; what the run has written of later steps is dropped."""
        if dist.is_main():
            journal.truncate(self.folder.path / "evals.jsonl", start)
        return monitor.Monitor(
            self.sections.monitor,
            self.folder.path,
            steps=self.steps,
            start=start,
            device=self.device,
            batch_size=self.sections.train.batch_size,
            speed=self.speed,
            save_every=self.sections.checkpoint.every_steps,
        )

    def _announce(self, state: dict[str, Any]) -> None:
        for problem in state["passed_over"]:
            self.monitor.say(f"warning: {problem}; an older one is taken", level=logging.WARNING)
        if state["passed_over"] and Path(state["path"]).parent == self.folder.checkpoints:
            self.checkpoints.go_back(Path(state["path"]), remove=False)
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
            TrainingError: more losses or gradients that are not finite than `faults` allows.
            checkpoint.CheckpointError: a checkpoint could not be written.
            StaleRunError: a newer start of the run owns the folder.
        """
        with Preemption() as preemption:
            self.watchdog.start()
            try:
                return self._run(preemption)
            except (TrainingError, TooManyBad):  # raised by all ranks alike
                self.checkpoints.wait()
                raise
            finally:
                self.watchdog.close()
                self.monitor.close()

    def _run(self, preemption: Preemption) -> int:
        if self._owed:
            self._call_hooks(self.start)
        done = self.start
        batches = self.data.batches(done) if done < self.steps else iter(())
        if self.sections.faults.spike and self._saved < 0:
            self.save(0)  # what a run can go back to before it has saved anything else
        while done < self.steps:
            agreed, trouble = self._step(done, batches, preemption)
            if agreed.written == dist.world():
                self.checkpoints.advance()
            if trouble is not None:
                back = self._recover(done, trouble)
                if back is not None:
                    batches = iter(())  # the old ones let go of their workers first
                    done, batches = back, self.data.batches(back)
            else:
                done += 1
            if agreed.requeue or agreed.interrupted:
                self._stop(done, hooks_owed=trouble is None)
                return EXIT_INTERRUPTED if agreed.interrupted else EXIT_REQUEUE
            if trouble is not None:
                continue
            self._call_hooks(done)
            if agreed.save or done % (self.sections.checkpoint.every_steps or done + 1) == 0:
                self.save(done)
            if done == self.start + 2:
                gc.freeze()  # what lives now lives to the end: later collections skip it
        if self._saved < self.steps:
            self.save(self.steps)
        with self.watchdog.during("save"):
            self.checkpoints.wait()
        return 0

    def _stop(self, done: int, *, hooks_owed: bool) -> None:
        if self._saved != done:
            self.save(done, hooks_owed=hooks_owed)
        with self.watchdog.during("save"):
            self.checkpoints.wait()
        self.monitor.say(f"stopped by a signal after step {done}; start the same command again to go on")

    def _call_hooks(self, done: int) -> None:
        for hook in self.hooks:
            if done % hook.every == 0 or done == self.steps:
                with self.watchdog.during("eval"), self.engine.evaluating():
                    hook.call(done)

    def _step(self, index: int, batches: Iterator[Batch], preemption: Preemption) -> tuple[Agreed, Trouble | None]:
        """Run step `index`; return what the ranks agreed on, and why no update was made where none was."""
        began = time.perf_counter()
        self.watchdog.enter("data", index + 1)
        self.stragglers.begin()
        try:
            batch = next(batches)
        except StopIteration:
            raise TrainingError(f"step {index + 1}: the data ended; data must go on for {self.steps} steps") from None
        waited = time.perf_counter() - began
        self.stragglers.got_data()
        self.watchdog.enter("forward")
        self.recovery.buffers.keep()
        logs, (loss, agreement) = self.gradients(
            batch, index, lambda loss: self._agree(loss.detach(), index, batch, preemption)
        )
        agreed = agreement.read()
        if agreed.stale:
            raise StaleRunError(
                f"{self.folder.path}: a newer start of this run has taken over the folder; this one ends"
            )
        if agreed.bad and not agreed.broken:
            self.data.on_bad(batch, index)
        self.watchdog.enter("update")
        lr = self.sections.optim.learning_rate(index, self.steps)
        self.checkpoints.block.fence()  # a save that is still being copied
        norm = self.engine.step(lr, broken=bool(agreed.broken))
        assert not (agreed.broken and math.isfinite(norm)), "an update was made of a loss that is not finite"
        scaled = self.engine.loss_scale is not None
        trouble = self.recovery.judge(agreed, norm, scaled=scaled, loss=loss, batch=batch)
        if trouble is not None:
            return agreed, trouble
        scalars = {"loss": agreed.loss, "lr": lr, "grad_norm": norm}
        if self.engine.loss_scale is not None:
            scalars["loss_scale"] = self.engine.loss_scale.scale
        if self.monitor.due(index + 1):
            scalars = {**mean_logs(logs), **scalars}
            if slow := self.stragglers.report():
                self.monitor.say(f"step {index + 1}: {slow}", level=logging.WARNING)
            if dist.is_main():
                self.folder.check_token()
        self.monitor.record(index + 1, seconds=time.perf_counter() - began, data_wait=waited, scalars=scalars)
        return agreed, None

    def _agree(self, loss: Tensor, index: int, batch: Batch, preemption: Preemption) -> tuple[Tensor, Agreement]:
        """Ask the ranks of step `index`, before its last backward; the answer is read after it: the wait is hidden."""
        agreement = Agreement(
            loss,
            batch,
            preemption,
            save=self._minutes_are_over(),
            written=self.checkpoints.ready,
            stale=dist.is_main() and self.monitor.due(index + 1) and not self.folder.owned(),
        )
        self.watchdog.enter("backward")
        return loss, agreement

    def _recover(self, index: int, trouble: Trouble) -> int | None:
        """Leave out the batch of step `index`, or go back; return the step to go on from where the run went back.

        Raises:
            TrainingError: neither is allowed or possible.
        """
        if said := self.recovery.skip(index, trouble):
            self.monitor.say(said, level=logging.WARNING)
            return None
        with self.watchdog.during("going back"):
            self.checkpoints.wait()
            state, said = self.recovery.go_back(self.engine, index, trouble, fingerprint=self.identity.fingerprint)
            done = self._saved = int(state["step"])
            self.monitor.close()
            self.monitor = self._monitor(done)
            self.monitor.say(said, level=logging.WARNING)
            return done

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.engine.close()

    def _minutes_are_over(self) -> bool:
        minutes = self.sections.checkpoint.every_minutes  # rank 0's clock decides for all
        return dist.is_main() and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, done: int, *, hooks_owed: bool = False) -> None:
        """Begin to write a checkpoint after `done` steps. All ranks call it. The next start calls owed hooks."""
        state = {
            "step": done,
            "hooks_owed": hooks_owed,
            "data": self.data.state(done),
            "faults": self.recovery.faults.state(),
            "fingerprint": self.identity.fingerprint,
            "optimisation": self.identity.optimisation,
            "incarnation": self.folder.token,
        }
        with self.watchdog.during("save"):
            self.checkpoints.save(self.engine, state)
        self._saved, self._saved_at = done, time.monotonic()


def mean_logs(logs: dict[str, Tensor]) -> dict[str, float]:
    """Return each scalar's mean over ranks (the names must be the same on all ranks)."""
    if not logs:
        return {}
    names = sorted(logs)
    values = dist.mean(torch.stack([logs[n].detach().double().reshape(()) for n in names]))
    return dict(zip(names, values.tolist()))

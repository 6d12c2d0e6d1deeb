"""Checkpoints that know no ZeRO stage and no number of ranks; complete or invisible.

    checkpoints/step-00001000/part-00003-of-00008.safetensors   what rank 3 owns: 1-D pieces of parameters
                              state.json     step, data state, optimizer step, loss scale, fingerprint
                              COMPLETE       size and SHA-256 of every other file
    checkpoints/latest                       the name of the newest one

Each rank writes only what it already holds, so that saving moves no data between ranks; each rank reads only the
pieces that overlap what it will hold. A save goes to a hidden folder, is fsynced, and gets its name by one rename.

With `async: true` training goes on while bytes are written, at the price of as much host memory as the parts take:
1. `save` copies what this rank writes to host memory and starts a thread that writes, hashes and fsyncs it;
2. once the threads of all ranks are through (the all-reduce of each step tells), `advance` gathers sizes and sums, and
   a thread of rank 0 writes state.json and COMPLETE, renames, and points `latest` at the new one;
3. once that is through, `advance` again: the checkpoint exists, or all ranks hear why it does not.
The threads call no collective. The next save, the end of the run and a stop by a signal wait for the one before.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError

from pretrain import dist
from pretrain.config import ConfigError, Section
from pretrain.engine import share
from pretrain.engine.pieces import (
    CheckpointError,
    compare,
    complete,
    flatten,
    given,
    read_weights,
    step_of,
    verify,
)
from pretrain.engine.publication import VERSION, Publication
from pretrain.engine.run_folder import RunFolder, StaleRunError
from pretrain.engine.writer import Block, Task
from pretrain.engine.zero import Engine

log = logging.getLogger("diptych")

__all__ = ["CheckpointError", "Checkpoints", "Config", "complete", "flatten", "given", "read_weights", "step_of"]


class Config(Section):
    """The `checkpoint:` section."""

    every_steps: int | None = Field(500, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep_last: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)  #: also keep those whose step is a multiple of this
    asynchronous: bool = Field(default=True, alias="async")  #: training goes on while a checkpoint is written
    frozen: bool = True  #: also what does not train; fine-tuning leaves it out, as its base has it
    resume: str = "auto"  #: auto: the newest in the run folder, if any; none; or the path of a checkpoint


def _agree(work: Callable[[], Any], what: str) -> list[Any]:
    """Run local work on every rank and return all results; raise the same error on all where one rank failed."""
    problem, value = None, None
    try:
        value = work()
    except StaleRunError as error:
        problem = ("stale", str(error))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        problem = ("failed", f"rank {dist.rank()}: {error}")
    answers = dist.gather_objects((problem, value))
    for found, _ in answers:
        if found and found[0] == "stale":
            raise StaleRunError(found[1])
        if found:
            raise CheckpointError(f"{what}: {found[1]}")
    return [value for _, value in answers]


@dataclass
class _Save:
    """A checkpoint that is being written."""

    final: Path
    hidden: Path
    state: dict[str, Any]
    task: Task  #: of this rank
    began: float
    stalled: float  #: seconds for which training stood still
    publishing: bool = False


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self.folder = folder
        self.config = config
        self.block = Block()
        self.publication = Publication(folder, keep_last=config.keep_last, keep_every=config.keep_every)
        self._save: _Save | None = None
        self._saves = 0

    def save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint of `state["step"]`, and wait for it where it is not to be written meanwhile.

        All ranks call it together. The weights may be changed after `block.fence`.

        Raises:
            CheckpointError: it, or the one before, could not be written (a full disk); older ones are intact, nothing
                half-written is left.
            StaleRunError: a newer start of the run owns the folder.
        """
        began = time.monotonic()
        self.wait()
        final = self.folder.checkpoints / f"step-{state['step']:08d}"
        self._saves += 1
        hidden = self.publication.hidden(final, str(self._saves))
        state = {
            **state,
            "version": VERSION,
            "optimizer_step": engine.optimizer_step(),
            "loss_scale": engine.loss_scale.state() if engine.loss_scale else None,
            "parameters": {name: list(shape) for name, shape in engine.shapes.items()},
            "buffers": {name: [str(b.dtype)[6:], *b.shape] for name, b in share.buffers(engine.module).items()},
            "world": dist.world(),
            "stage": engine.stage,
        }
        self.block.fill(share.written(engine))
        part = hidden / f"part-{dist.rank():05d}-of-{dist.world():05d}.safetensors"
        task = self._begun(lambda: {part.name: self.block.write(part, check=self.folder.check_token)})
        self._save = _Save(final, hidden, state, task, began, time.monotonic() - began)
        if not self.config.asynchronous:
            self.wait()
            self.block.release()

    def _begun(self, work: Callable[[], Any]) -> Task:
        """Do work in a thread; where the folder is found to be another's, what was written of this start goes."""

        def tidy() -> Any:
            try:
                return work()
            except (OSError, StaleRunError):  # a newer start removes what an older one is about to rename
                if not self.folder.owned():
                    self.publication.clear()
                self.folder.check_token()
                raise

        return Task(tidy)

    @property
    def ready(self) -> bool:
        """Return whether this rank's thread is through; where that holds on all ranks, all call `advance`."""
        return self._save is not None and self._save.task.done

    def wait(self) -> None:
        """Finish what is being written. All ranks call it.

        Raises:
            CheckpointError, StaleRunError: as `save`.
        """
        began = time.monotonic()
        while self._save is not None:
            save = self._save
            self.advance()
            save.stalled += time.monotonic() - began
            began = time.monotonic()

    def advance(self) -> None:
        """Take the save one stage further, waiting for the ranks' threads. All ranks call it.

        Raises:
            CheckpointError, StaleRunError: as `save`.
        """
        save = self._save
        assert save is not None
        what = f"checkpoint {save.final} was not written"
        try:
            found = _agree(save.task.result, what)
        except CheckpointError as error:
            self._save = None
            if dist.is_main():
                self.publication.clear()
            dist.barrier()
            raise CheckpointError(
                f"{error}; the older checkpoints are intact. Free space or lower checkpoint.keep_last, then start again"
            ) from error
        if save.publishing:
            self._save = None
            seconds = time.monotonic() - save.began
            if dist.is_main():
                log.info(
                    "%s: complete after %.2f s, of which training stood %.2f s", save.final.name, seconds, save.stalled
                )
            return
        files = {name: facts for part in found for name, facts in part.items()}
        save.publishing = True
        save.task = self._begun(lambda: self._publish(save, files))

    def _publish(self, save: _Save, files: dict[str, Any]) -> None:
        if dist.is_main():
            self.publication.publish(save.hidden, save.final, state=save.state, files=files)

    def go_back(self, path: Path, *, remove: bool) -> None:
        """Let `latest` name an older checkpoint, so that later ones count no more; or remove them. All ranks call it.

        Raises:
            CheckpointError, StaleRunError: as `save`.
        """

        def point() -> None:
            if dist.is_main():
                self.publication.go_back(path, remove=remove)

        _agree(point, f"checkpoint {path}: `latest` was not set to it")

    # -- resuming ------------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Path]:
        """Return what `resume` allows, newest first; all ranks call it."""
        found: list[Path] = []
        if dist.is_main():
            if self.config.resume == "auto":
                found = complete(self.folder.checkpoints)
            elif self.config.resume != "none":
                found = given(Path(self.config.resume))
        return [Path(p) for p in dist.broadcast_object([str(p) for p in found])]

    def restore(
        self, engine: Engine, *, fingerprint: dict[str, Any], among: list[Path] | None = None
    ) -> dict[str, Any] | None:
        """Continue from the newest undamaged checkpoint; return its state, or None where there is none.

        `path` of the state says which it was, `passed_over` why newer ones were not taken. All ranks call it.

        Raises:
            ConfigError: it belongs to another order or architecture.
            CheckpointError: there are checkpoints, but each is damaged.
        """
        found = self.candidates() if among is None else among
        if self.config.resume not in ("auto", "none") and not found:
            raise ConfigError(f"checkpoint.resume: {self.config.resume} holds no complete checkpoint; check the path")
        problems = []
        for path in found:
            try:
                _agree(lambda path=path: verify(path), f"checkpoint {path} is damaged")  # type: ignore[misc]
                state = json.loads((path / "state.json").read_bytes())
                compare(state["fingerprint"], fingerprint, path)
                compare({"parameters": state["parameters"]}, {"parameters": engine.shapes}, path)
                _agree(lambda path=path, state=state: share.load(engine, path, state), f"checkpoint {path}")  # type: ignore[misc]
            except CheckpointError as error:
                problems.append(str(error))
                continue
            engine.state.refresh()
            return {**state, "path": str(path), "passed_over": problems}
        if found:
            raise CheckpointError(f"{problems[-1]}; no older one is left. Remove them, or set checkpoint.resume=none")
        return None

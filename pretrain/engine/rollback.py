"""What a run does about a loss or gradient that is not finite and about a loss that jumps: leave out, go back, or end.

A batch whose loss or gradient is not finite on any rank is left out on the spot: no update is made, buffers are put
back to what they were before it, and the batch after it takes its step, its learning rate and its random numbers. So
the run goes on bit-equal to one that was told `faults.leave_out` that batch from its start (with fp16, where the loss
itself is not finite; an overflow of scaled gradients only lowers the scale).

Several such batches in a row, or a loss that jumps (`faults.spike`), mean that the weights went wrong before: the run
goes back to a checkpoint and leaves out these batches and the few before them (as PaLM's training did by hand, section
5.1 of arXiv:2204.02311).

All of it is decided from what all ranks have agreed on, and written to `faults.jsonl` before the next batch is trained
on: a run that is killed and goes on leaves out the same batches, or meets the same trouble once more.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain import dist
from pretrain.config import Section
from pretrain.engine import journal
from pretrain.engine.pieces import step_of
from pretrain.engine.run_folder import RunFolder

NORMAL = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
FLAT = 0.01  # of the median: a loss that hardly varies must still be allowed to
KEYS = 8  # samples of each rank that are named in faults.jsonl


class Config(Section):
    """The `faults:` section."""

    skips: int = Field(3, ge=0)  #: batches in a row that are left out for a loss or gradient that is not finite
    spike: float | None = Field(None, gt=0)  #: a loss so many deviations over the median of the window; null: none is
    window: int = Field(128, ge=8)  #: steps by which a spike is judged
    back: int = Field(8, ge=0)  #: batches before the trouble that are left out too where the run goes back
    rollbacks: int = Field(3, ge=0)  #: how often a run goes back before it ends
    limit: int = Field(100, ge=0)  #: batches that a run leaves out by itself before it ends
    leave_out: list[int] = []  # noqa: RUF012  #: batches that are never trained on, counted from 0


class Trouble(NamedTuple):
    """What is wrong with a step."""

    kind: Literal["loss", "gradient", "spike"]
    loss: float
    why: str


class Buffers:
    """The module's buffers as they were before a step that may not be made: a forward changes them."""

    def __init__(self, module: nn.Module) -> None:
        self._live: list[Tensor] = [b for b in module.buffers() if b.numel()]
        self._kept = [b.detach().clone() for b in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them."""
        for kept, live in zip(self._kept, self._live):
            kept.copy_(live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what a forward did to them."""
        for kept, live in zip(self._kept, self._live):
            live.copy_(kept)


class Faults:
    """Judges steps and remembers what is left out. All ranks hold the same."""

    def __init__(self, config: Config, folder: RunFolder, *, fresh: bool) -> None:
        """Read `faults.jsonl`, which `fresh` (a run started anew in its folder) clears. All ranks call it."""
        self.config = config
        self.folder = folder
        self.path = folder.path / "faults.jsonl"
        if fresh and dist.is_main():
            self.path.unlink(missing_ok=True)
        lines = dist.broadcast_object(journal.read(self.path) if dist.is_main() else None)
        self.left_out = {batch for line in lines for batch in line.get("left_out", ())}  #: by the run itself
        self.rollbacks = sum(line.get("back_to") is not None for line in lines)
        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.window)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a run that goes on judges as one that never stopped."""
        losses = list(self._losses) if self.config.spike else []
        return {"in_a_row": self.in_a_row, "losses": losses}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state; older ones have none."""
        self.in_a_row = state.get("in_a_row", 0)
        self._losses = deque(state.get("losses", ()), maxlen=self.config.window)

    def wanted(self, position: int) -> list[int]:
        """Return the batches from `position` on that are to be left out; earlier ones have been trained on."""
        return sorted(b for b in self.left_out | set(self.config.leave_out) if b >= position)

    def judge(self, loss: float, *, broken: int, norm: float, scaled: bool) -> Trouble | None:
        """Return what is wrong with a step; `scaled` says that an infinite gradient may be the loss scale's fault."""
        if broken:
            return Trouble("loss", math.nan, f"the loss is not finite on {broken} of {dist.world()} ranks")
        if not math.isfinite(norm) and not scaled:
            return Trouble("gradient", loss, f"the gradient is not finite although the loss is {loss:.4g}")
        self.in_a_row = 0
        if self.config.spike and len(self._losses) == self._losses.maxlen:
            middle = statistics.median(self._losses)
            spread = max(NORMAL * statistics.median(abs(x - middle) for x in self._losses), FLAT * abs(middle))
            if loss > middle + self.config.spike * spread:
                why = f"the loss is {loss:.4g}, the median of {len(self._losses)} steps {middle:.4g} +- {spread:.2g}"
                return Trouble("spike", loss, why)
        if math.isfinite(norm):
            self._losses.append(loss)
        return None

    def may_skip(self, trouble: Trouble) -> bool:
        """Count a trouble; return whether leaving out its one batch is enough."""
        self.in_a_row += 1
        return trouble.kind != "spike" and self.in_a_row <= self.config.skips

    def over_limit(self, more: Iterable[int], *, back: bool) -> str:
        """Return a sentence where leaving out `more`, or going back, is more than the run may do by itself, else ''."""
        count = len(self.left_out | set(more))
        if count > self.config.limit:
            return f"{count} batches would be left out, over faults.limit={self.config.limit}"
        if back and self.rollbacks >= self.config.rollbacks:
            return f"the run has gone back {self.rollbacks} times, faults.rollbacks allows no more"
        return ""

    def note(self, step: int, trouble: Trouble, batches: list[int], back_to: int | None, where: dict[str, Any]) -> None:
        """Remember and write down what is left out; `step` is the one that could not be made. All ranks call it."""
        self.left_out |= set(batches)
        self.rollbacks += back_to is not None
        if dist.is_main():
            line = {
                "step": step,
                "what": trouble.kind,
                "why": trouble.why,
                "loss": trouble.loss if math.isfinite(trouble.loss) else None,
                "left_out": batches,
                "back_to": back_to,
                **where,
                "time": time.time(),
            }
            journal.append(self.path, line, check=self.folder.check_token)


def choose(found: list[Path], step: int, back: int) -> Path | None:
    """Return the checkpoint to go back to: the newest from before the batches that will be left out.

    Where all are newer than that, the oldest before `step`: fewer batches are left out then.
    """
    before = [path for path in found if step_of(path) < step]
    return next((path for path in before if step_of(path) <= step - back), before[-1] if before else None)


def whereabouts(loss: Tensor, keys: list[str]) -> dict[str, Any]:
    """Return which ranks' loss is not finite, and the first samples that they hold. All ranks call it."""
    here = not bool(loss.isfinite().all())
    found = dist.gather_objects(keys[:KEYS] if here else None)
    bad = {rank: names for rank, names in enumerate(found) if names is not None}
    return {"ranks": sorted(bad), "keys": [name for names in bad.values() for name in names]}

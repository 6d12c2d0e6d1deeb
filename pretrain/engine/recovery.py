"""How a run gets over a step that may not be made: it leaves out the batch, goes back to a checkpoint, or ends.

What is wrong with a step, and what may be done about it, is judged in rollback.py; here it is done.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.engine import checkpoint, rollback
from pretrain.engine.agreement import Agreed
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.parts import Data
from pretrain.engine.rollback import Trouble
from pretrain.engine.run_folder import RunFolder
from pretrain.engine.zero import Engine


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why and what to do."""


class Recovery:
    """Meets the troubles of one run. All ranks call each method alike."""

    def __init__(
        self,
        config: rollback.Config,
        folder: RunFolder,
        *,
        module: nn.Module,
        data: Data,
        checkpoints: Checkpoints,
        fresh: bool,
    ) -> None:
        """`fresh` says that the run starts anew in its folder: what it left out before counts no more."""
        self.config = config
        self.data = data
        self.checkpoints = checkpoints
        self.faults = rollback.Faults(config, folder, fresh=fresh)
        self.buffers = rollback.Buffers(module)
        self._where: dict[str, Any] = {}  # which ranks and samples the last trouble was about

    def leave_out(self, start: int) -> None:
        """Leave out what the config and earlier troubles say, from step `start` on.

        Raises:
            ConfigError: the data cannot.
        """
        wanted = self.faults.wanted(self.data.batch_at(start))
        if wanted and self.data.exclude is not None:
            self.data.exclude(wanted)
        elif set(wanted) & set(self.config.leave_out):  # what the run itself left out is in no order to meet
            raise ConfigError("faults.leave_out: batches of data.order=stream have no numbers; leave it empty")

    def judge(self, agreed: Agreed, norm: float, *, scaled: bool, loss: Tensor, batch: Batch) -> Trouble | None:
        """Return what is wrong with a step that was made of this rank's `loss` and `batch`, and undo what it did."""
        trouble = self.faults.judge(agreed.loss, broken=agreed.broken, norm=norm, scaled=scaled)
        if trouble is not None:
            self.buffers.put_back()
            self._where = rollback.whereabouts(loss, [key for mini in batch.minis() for key in mini.keys])
        return trouble

    def skip(self, index: int, trouble: Trouble) -> str | None:
        """Leave out the batch of step `index` and say so; None where that is not enough.

        Raises:
            TrainingError: the run has left out as much as it may.
        """
        if not self.faults.may_skip(trouble):
            return None
        batch = self.data.batch_at(index)
        self._refuse(index, trouble, self.faults.over_limit([batch], back=False))
        self.faults.note(index + 1, trouble, [batch], None, self._where)
        if self.data.exclude is not None:
            self.data.exclude([batch])
        return f"step {index + 1}: {trouble.why}; batch {batch} is left out"

    def go_back(
        self, engine: Engine, index: int, trouble: Trouble, *, fingerprint: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        """Load a checkpoint from before step `index`, leave out the batches since; return its state and say so.

        Raises:
            TrainingError: there is none, or the run has gone back as often as it may.
        """
        batches, state = self._load_older(engine, index, trouble, fingerprint)
        done = int(state["step"])
        self.checkpoints.go_back(Path(state["path"]), remove=True)
        self.faults.note(index + 1, trouble, batches, done, self._where)
        self.faults.restore(state.get("faults") or {})
        self.data.restore(state["data"])
        self.leave_out(done)
        return state, (
            f"step {index + 1}: {trouble.why}; back to {state['path']}, "
            f"batches {batches[0]} to {batches[-1]} are left out"
        )

    def _load_older(
        self, engine: Engine, index: int, trouble: Trouble, fingerprint: dict[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        found = dist.broadcast_object(
            checkpoint.complete(self.checkpoints.folder.checkpoints) if dist.is_main() else None
        )
        target = rollback.choose(found, index, self.config.back)
        if self.data.exclude is None:
            self._refuse(index, trouble, f"{self.faults.in_a_row} in a row, and data.order=stream cannot go back")
        if target is None:
            self._refuse(index, trouble, f"{self.faults.in_a_row} in a row, and there is no checkpoint to go back to")
        assert target is not None
        first = max(checkpoint.step_of(target), index - self.config.back)
        batches = sorted({self.data.batch_at(step) for step in range(first, index + 1)})
        self._refuse(index, trouble, self.faults.over_limit(batches, back=True))
        among = [path for path in found if checkpoint.step_of(path) <= checkpoint.step_of(target)]
        state = self.checkpoints.restore(engine, fingerprint=fingerprint, among=among)
        assert state is not None
        return batches, state

    def _refuse(self, index: int, trouble: Trouble, reason: str) -> None:
        if reason:
            raise TrainingError(
                f"step {index + 1}: {trouble.why}; {reason}. Lower optim.lr, lengthen optim.warmup or use "
                "train.precision=bf16. The last checkpoint is intact"
            )

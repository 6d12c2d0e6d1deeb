"""What all ranks know of a step, by one small all-reduce: the mean loss, and what makes all of them stop or skip."""

from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from pretrain import dist
from pretrain.batch import Batch
from pretrain.engine.preemption import Preemption


class Agreed(NamedTuple):
    """What all ranks know of a step; counts of ranks unless said otherwise."""

    loss: float  #: mean over ranks; of a rank whose loss is not finite, 0 counts
    broken: int  #: whose loss is not finite
    bad: int  #: replaced samples
    requeue: int  #: that were asked to stop and be started again
    interrupted: int  #: that saw a Ctrl-C
    save: int  #: checkpoint.every_minutes are over
    written: int  #: whose part of the checkpoint that is being written is on disk
    stale: int  #: that found the run folder taken over by a newer start


class Agreement:
    """One small all-reduce a step, by which ranks share the loss and decide together."""

    def __init__(
        self,
        loss: Tensor,
        batch: Batch,
        preemption: Preemption,
        *,
        save: bool,
        written: bool = False,
        stale: bool = False,
    ) -> None:
        value = loss.detach().double().reshape(1)
        finite = value.isfinite()
        facts = [len(batch.bad), preemption.requeue, preemption.interrupted, save, written, stale]
        rest = torch.tensor(facts, dtype=torch.float64).to(value.device, non_blocking=True)
        self._word = torch.cat([torch.where(finite, value, 0.0), (~finite).double(), rest])
        dist.meet()
        self._work = torch_dist.all_reduce(self._word, async_op=True) if dist.world() > 1 else None

    def read(self) -> Agreed:
        """Wait for the ranks."""
        if self._work is not None:
            self._work.wait()
        loss, *counts = self._word.tolist()
        return Agreed(loss / dist.world(), *(int(c) for c in counts))

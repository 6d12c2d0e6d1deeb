"""What a trainer is given beside its module: sections of the config, batches, hooks, and whose a checkpoint is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pretrain.batch import Batch
from pretrain.engine import checkpoint, deepspeed_config, monitor, optim, rollback, steps, stragglers, watchdog


class Sections(Protocol):
    """The sections of the whole config that the trainer reads."""

    train: steps.Config
    optim: optim.Config
    zero: deepspeed_config.Config
    checkpoint: checkpoint.Config
    monitor: monitor.Config
    faults: rollback.Config
    watchdog: watchdog.Config
    stragglers: stragglers.Config


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
    #: leaves out batches by number, from the next step on; None: they have no numbers, and a run cannot go back
    exclude: Callable[[Iterable[int]], None] | None = None
    batch_at: Callable[[int], int] = lambda step: step  #: step (from 0) -> the number of the batch that it trains on
    #: called on all ranks, before the update, at steps where some rank's batch has replaced samples (`Batch.bad`)
    on_bad: Callable[[Batch, int], None] = lambda batch, step: None


@dataclass(kw_only=True)
class Identity:
    """What a checkpoint belongs to."""

    fingerprint: dict[str, Any] = field(default_factory=dict)  #: {"order": ..., "architecture": ...}: must be equal
    optimisation: dict[str, Any] = field(default_factory=dict)  #: may change between starts, with a warning

"""Which rank is slow: how long each one works before it first meets the others in a step.

Ranks wait for each other in every exchange, so that the whole step takes equally long everywhere. What tells them apart
is the time from the start of a step to the first exchange, in which each waits for its data and runs its towers alone.
On a GPU it is the time on the device, by events.
"""

import socket
import statistics
import time
from typing import Any

import torch
from pydantic import Field

from pretrain import dist
from pretrain.config import Section


class Config(Section):
    """The `stragglers:` section."""

    factor: float = Field(1.5, gt=1)  #: a rank that takes this many times as long as the median is named
    seconds: float = Field(0.02, ge=0)  #: and by so much a step


class Stragglers:
    """Times steps; `report` compares the ranks."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._alone: list[float] = []  # seconds of a step before its first exchange
        self._waited: list[float] = []  # of it, for data
        self._events: list[tuple[Any, Any]] = []
        self._start: Any = None

    def begin(self) -> None:
        """Start the clock of a step."""
        self._start = time.perf_counter()
        dist.ON_EXCHANGE = self._meet

    def got_data(self) -> None:
        """Note that the batch is there."""
        self._waited.append(time.perf_counter() - self._start)
        if self.device.type == "cuda":
            self._events.append((_event(), None))

    def _meet(self) -> None:
        dist.ON_EXCHANGE = None  # only the first exchange of a step tells
        self._alone.append(time.perf_counter() - self._start)
        if self._events:
            self._events[-1] = (self._events[-1][0], _event())

    def report(self) -> str:
        """Return a sentence about the slowest rank of the steps since the last report, or ''. All ranks call it."""
        dist.ON_EXCHANGE = None
        n = max(1, len(self._alone))
        waited = sum(self._waited) / n
        alone = sum(self._alone) / n
        pairs = [(a, b) for a, b in self._events if b is not None]
        if pairs:
            torch.cuda.synchronize()
            alone = waited + sum(a.elapsed_time(b) for a, b in pairs) / 1000 / len(pairs)
        self._alone, self._waited, self._events = [], [], []
        if dist.world() < 2:
            return ""
        row = torch.tensor([[alone, waited]], dtype=torch.float64, device=self.device)
        table = dist.gather(row).tolist()
        slow = max(range(len(table)), key=lambda rank: table[rank][0])
        middle = statistics.median(alone for rank, (alone, _) in enumerate(table) if rank != slow)
        alone, waited = table[slow]
        if alone < self.config.factor * middle or alone - middle < self.config.seconds:
            return ""
        hosts = dist.gather_objects(socket.gethostname())
        return (
            f"rank {slow} on {hosts[slow]} is slow: {alone:.3f} s a step before it meets the others, "
            f"{waited:.3f} of it waiting for data; the others' median is {middle:.3f}"
        )


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

"""Downloads of shards that will be read soon, by a few threads of the process that reads them.

Which shards those are, the order tells: of the batches ahead, the near ones are all looked at and the far ones now and
then. How many shards are fetched before their time is bounded, so that they do not push out of the cache what is being
read.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from pretrain.data.format import ShardError

THREADS = 4
LOOKS = ((1, 16), (16, 256), (256, 4096))  # every so manieth batch, up to so many batches ahead
NEVER = -1 << 60  # a batch
PAUSE = 0.05  # seconds after a failure

log = logging.getLogger("diptych")


class Shelf(Protocol):
    """Where shards are fetched to."""

    def here(self, shard: int) -> bool:
        """Return whether a shard is there, or on its way thanks to another process."""

    def fetch(self, shard: int) -> None:
        """Bring a shard, wait for it."""


class Prefetch:
    """Fetches shards by number, soonest first, as many before they are read as the last look allows.

    Threads start with the first wish, in the process that has it: a fork starts its own.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._ahead = shelf, 0
        self._owner = 0
        self._last = NEVER
        self._reset()

    def look(self, batch: int, shards_of: Callable[[int], Iterable[int]], *, ahead: int) -> None:
        """Note which shards `batch` and those after it need; called before each batch that is read.

        At most `ahead` shards are fetched before they are read; below 1, none is.
        """
        if ahead < 1:
            return
        self._ahead = ahead
        if self._owner not in (0, os.getpid()):
            self._owner = 0
            self._reset()
        with self._change:
            if not self._last <= batch <= self._last + LOOKS[-1][1]:  # the first call, or a jump; workers take turns
                self._next = [batch for _ in LOOKS]
                self._wanted.clear()
                self._ready.clear()
            self._last = batch
            for waiting in (self._wanted, self._ready):  # what was due is read, fetched or not
                for shard in [shard for shard, due in waiting.items() if due < batch]:
                    del waiting[shard]
        for number, (stride, reach) in enumerate(LOOKS):
            self._next[number] = max(self._next[number], batch)
            while self._next[number] <= batch + reach:
                self._want(self._next[number], set(shards_of(self._next[number])))
                self._next[number] += stride
        if self._wanted and not self._owner:
            self._owner = os.getpid()
            for _ in range(THREADS):
                threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def used(self, shard: int) -> None:
        """Note that a shard is read: there is room for another."""
        if shard in self._ready or shard in self._wanted:
            with self._change:
                self._ready.pop(shard, None)
                self._wanted.pop(shard, None)
                self._change.notify_all()

    def _reset(self) -> None:
        self._change = threading.Condition()
        self._wanted: dict[int, int] = {}  #: shard -> the batch that needs it first
        self._ready: dict[int, int] = {}  #: the same, fetched or being fetched
        self._next = [0 for _ in LOOKS]
        self._last = NEVER

    def _want(self, batch: int, shards: set[int]) -> None:
        with self._change:
            for shard in shards:
                for waiting in (self._wanted, self._ready):
                    if shard in waiting:
                        waiting[shard] = min(waiting[shard], batch)
                        break
                else:
                    if not self._shelf.here(shard):
                        self._wanted[shard] = batch
            self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._wanted or len(self._ready) >= self._ahead:
                    self._change.wait()
                shard = min(self._wanted, key=self._wanted.__getitem__)
                self._ready[shard] = self._wanted.pop(shard)
            if self._shelf.here(shard):
                continue
            try:
                self._shelf.fetch(shard)
            except ShardError as error:  # whoever reads it is told, in its time and place
                log.debug("prefetch: %s", error)
                time.sleep(PAUSE)

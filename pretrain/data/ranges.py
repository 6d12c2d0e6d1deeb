"""Single samples over the network: a batch's samples are asked for side by side before they are read one by one."""

import os
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from pretrain.data.depot import Depot
from pretrain.data.format import Entry
from pretrain.data.order import Place
from pretrain.data.remote import Url

THREADS = 16  # a request takes some 20 ms wherever it goes: its cost is waiting

Members = dict[str, bytes]


class Ranges:
    """Samples of a depot by place. Threads start with the first question, in the process that has it."""

    def __init__(self, depot: Depot) -> None:
        self.depot = depot
        self._owner = 0

    def ask(self, questions: Iterable[tuple[Place, Url, Entry]]) -> None:
        """Begin to read the samples of a batch; what was asked for before and is not among them is forgotten."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._asked: dict[Place, Future[Members]] = {}
            self._questions: queue.SimpleQueue[tuple[Future[Members], Url, Entry]] = queue.SimpleQueue()
            for _ in range(THREADS):  # daemons: a process must not wait for a dead server before it ends
                threading.Thread(target=self._answer, name="ranges", daemon=True).start()
        before, self._asked = self._asked, {}  # a sample that a batch leaves out is never read
        for place, path, entry in questions:
            future = before.get(place)
            if future is None:
                future = Future()
                self._questions.put((future, path, entry))
            self._asked[place] = future

    def members(self, place: Place, path: Url, entry: Entry) -> Members:
        """Return the bytes of a sample, asked for or not.

        Raises:
            ShardError: they cannot be read.
        """
        asked = self._asked.pop(place, None) if self._owner == os.getpid() else None
        return asked.result() if asked is not None else self.depot.members(path, entry)

    def _answer(self) -> None:
        while True:
            future, path, entry = self._questions.get()
            try:
                future.set_result(self.depot.members(path, entry))
            except Exception as error:  # it belongs to whoever reads the sample
                future.set_exception(error)

"""A thread in each rank that notices when the run hangs, says which rank holds up the others and where, and ends it.

The training thread says what it enters (data, forward, backward, update, save, eval ...). When that lasts too long, the
watchdogs share what each rank is in and which collective it called last (torch's flight recorder), and name the rank
that is furthest behind, or gives no sign of life at all: stopped, or in a call that never lets go of Python's lock.
Each rank writes its stacks to RUN/hang/, then leaves with the code that asks for the same command again.

Time is counted in ticks of the watchdog's own: a machine that slept, or a job that was suspended, has not hung.
`kill -QUIT` prints the stacks of a rank that goes on.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as torch_dist
from pydantic import Field

from pretrain import dist
from pretrain.config import Section
from pretrain.engine import journal, recorder
from pretrain.engine.blame import STEP, Sign, Verdict, verdict
from pretrain.engine.preemption import EXIT_REQUEUE
from pretrain.engine.run_folder import RunFolder

LEAST, TIMES = 40.0, 10  # seconds; median steps
WARM = 3  # steps before a median says something: the first ones compile, and fill caches


class Config(Section):
    """The `watchdog:` section. A run that hangs ends with the exit code that asks for the same command again."""

    enabled: bool = True
    seconds: float | None = Field(None, gt=0)  #: a step longer than this hangs; null: ten median steps, at least 40 s
    data_seconds: float = Field(300, gt=0)  #: waiting for data is named after `seconds` and ended after this
    long_seconds: float = Field(1800, gt=0)  #: the first steps, evals, saves


class Watchdog:
    """Watches from `start` to `close`."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self._phase, self._at, self._turn = "start", 0, 0
        self._steps: deque[float] = deque(maxlen=50)
        self._began = 0.0
        self._clock = time.monotonic
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._named = -1
        self._beat, self._age, self._tick = 0, 0.0, min(1.0, (config.seconds or LEAST) / 10)
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def start(self) -> None:
        """Begin to watch. All ranks call it."""
        if not self.config.enabled:
            return
        with contextlib.suppress(ValueError, AttributeError):  # no such signal here, or not the main thread
            faulthandler.register(signal.SIGQUIT)
        self._store = _store(f"watchdog/{self.folder.token}")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what this rank does from here on; `step` counts from 1."""
        if phase == STEP[0]:
            now = time.monotonic()
            if self._phase == STEP[-1]:
                self._steps.append(now - self._began)
            self._began = now
        self._phase = phase
        self._at = self._at if step is None else step
        self._turn += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Say that something else than a step goes on, and after it that this is over."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter("between" if before in STEP else before)

    def limit(self, phase: str) -> float:
        """Return the seconds after which a rank in this phase hangs."""
        if phase not in STEP or len(self._steps) < WARM:
            return max(self.config.long_seconds, self.config.seconds or 0)
        return max(self.patience(), self.config.data_seconds) if phase == "data" else self.patience()

    def patience(self) -> float:
        """Return the seconds after which a phase of a step is looked at."""
        return self.config.seconds or max(LEAST, TIMES * statistics.median(self._steps or [0.0]))

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        turn, last = self._turn, self._clock()
        self._live()
        while not self._end.wait(self._tick):
            now = self._clock()
            passed, last = min(now - last, 2 * self._tick), now  # not the time in which this process stood still
            self._age = self._age + passed if self._turn == turn else 0.0
            turn = self._turn
            self._live()
            look = self.patience() if self._phase in STEP and len(self._steps) >= WARM else self.limit(self._phase)
            if self._age > look:
                self._look()

    def _sign(self) -> Sign:
        calls, collective = recorder.last()
        host = socket.gethostname()
        phase = "compile" if self._age > self._tick and compiling(self._main) else self._phase
        return Sign(self._beat, self._at, phase, round(self._age, 1), calls, collective, host)

    def _live(self) -> None:
        """Say that this rank lives, and what it is in; thousands of ranks say so less often."""
        self._beat += 1
        if self._store is not None and self._beat % max(1, dist.world() // 200) == 0:
            with contextlib.suppress(RuntimeError):  # rank 0, which holds the store, has gone
                self._store.set(str(dist.rank()), json.dumps(self._sign()))

    def _signs(self) -> dict[int, Sign]:
        found = {dist.rank(): self._sign()}
        if self._store is None:
            return found
        for rank in range(dist.world()):
            with contextlib.suppress(RuntimeError, ValueError):
                if rank != dist.rank() and self._store.check([str(rank)]):
                    found[rank] = Sign(*json.loads(self._store.get(str(rank))))
        return found

    def _look(self) -> None:
        """Name the rank that holds up the run; end the run where it has had its time."""
        first = self._signs()
        turn = self._turn
        if not self._rest(5 * max(1, dist.world() // 200)) or self._turn != turn:
            return
        signs = self._signs()
        silent = {r for r, sign in signs.items() if r != dist.rank() and sign.beat == first.get(r, sign).beat}
        found = verdict(signs, silent, dist.world())
        over = found.phase == "no sign" or found.seconds > self.limit(found.phase)
        if self._named != turn or over:
            self._named = turn
            speaks = dist.rank() == min(set(signs) - silent)
            self._report(found, over=over, speaks=speaks)
            if over and speaks:
                self._note(found)
        if over:
            # the others are about to come to the same end: none is to see its neighbours vanish before it has spoken
            self._rest(8 * max(1, dist.world() // 200))
            os._exit(EXIT_REQUEUE)

    def _rest(self, ticks: int) -> bool:
        """Let time pass while showing that this rank lives; return whether the run still wants to be watched."""
        for _ in range(ticks):
            if self._end.wait(self._tick):
                return False
            self._age += self._tick
            self._live()
        return True

    def _report(self, found: Verdict, *, over: bool, speaks: bool) -> None:
        sign = self._sign()
        lines = [
            f"hang: {found.sentence}",
            f"rank {dist.rank()} on {sign.host}: in {sign.phase} of step {sign.step} for {sign.seconds:.0f} s; "
            f"last collective: {sign.collective}",
            "the run ends here; start the same command again to go on from the last checkpoint" if over else "",
        ]
        text = "\n".join(line for line in lines if line) + "\n"
        guilty = dist.rank() in found.ranks
        if speaks or guilty:
            sys.stderr.write(text)
            sys.stderr.flush()
        if guilty:
            faulthandler.dump_traceback(file=2)
        with contextlib.suppress(OSError, RuntimeError):
            self.folder.check_token()
            where = self.folder.path / "hang"
            where.mkdir(exist_ok=True)
            with open(where / f"rank-{dist.rank():05d}.txt", "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file=file)

    def _note(self, found: Verdict) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            line = {"step": self._at, "what": "hang", "why": found.sentence, "ranks": sorted(found.ranks)}
            faults = self.folder.path / "faults.jsonl"
            journal.append(faults, {**line, "time": time.time()}, check=self.folder.check_token)


def compiling(thread: int) -> bool:
    """Return whether a thread is in torch.compile, which may take minutes in any step that shows a new shape."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/_dynamo/convert_frame.py"):
            return True
        frame = frame.f_back
    return False


def _store(prefix: str) -> Any:
    """Return a connection of its own to the store by which the ranks met: the main thread may be waiting in its own."""
    if dist.world() == 1:
        return None
    store = torch_dist.distributed_c10d._get_default_store()
    with contextlib.suppress(AttributeError, RuntimeError):  # before torch 2.7
        store = store.clone()
    return torch_dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]

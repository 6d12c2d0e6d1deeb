"""Signals that ask a run to stop: save, leave with a code that says whether to start again.

SIGTERM and SIGUSR1 (SLURM's --signal, spot instances) on any rank and the first Ctrl-C only set a flag; the trainer
carries it to all ranks in the small all-reduce of each step, saves, and exits. The second Ctrl-C exits at once.
"""

import os
import signal
import sys
from types import FrameType

EXIT_REQUEUE = 85  #: preempted after a save: start the same command again
EXIT_INTERRUPTED = 130  #: Ctrl-C after a save: resumable, but somebody wanted it to stop

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Listens for signals while it is entered as a context."""

    def __init__(self) -> None:
        self.requeue = False
        self.interrupted = False
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader worker that was forked with this handler; its rank decides
            return
        if number != signal.SIGINT:
            self.requeue = True
            return
        if self.interrupted:
            os.write(2, b"\nsecond Ctrl-C: leaving without a save\n")
            os._exit(EXIT_INTERRUPTED)
        self.interrupted = True
        if sys.stderr.isatty():
            os.write(2, b"\nCtrl-C: saving a checkpoint after this step; press again to leave at once\n")

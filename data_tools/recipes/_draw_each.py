"""Drawings of strangers to pixels: one that is broken, crashes the renderer or never ends costs only itself."""

import io
import multiprocessing
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from PIL import Image

from data_tools.recipes._draw import leave_with_parent, render

AHEAD = 32  # drawings a process that may be finished before an earlier one is
# what is neither a part of the drawing nor data in it: files of the machine must not get into the picture
_OUTSIDE = re.compile(r"""\bhref\s*=\s*(["'])(?!\s*(?:#|data:)).*?\1""", re.S)


class Picture(NamedTuple):
    """What became of one drawing."""

    data: bytes
    problem: str  #: why there is none, or ""


class Studio:
    """Processes that draw; `kind` is png or webp, `seconds` of processor time are the limit of one drawing.

    Use as a context manager: no process is left behind. They start with the first drawing.
    """

    def __init__(self, *, size: int, kind: str, workers: int, seconds: float) -> None:
        self._words = (size, kind, seconds)
        self._workers = workers
        self._hands: list[_Hand] = []

    def draw(self, drawings: Sequence[str]) -> Iterator[Picture]:
        """Yield a picture for each drawing, in order; to be walked to its end before the next call."""
        while len(self._hands) < min(self._workers, len(drawings)):
            self._hands.append(_Hand(*self._words))
        done: dict[int, Picture] = {}
        given = taken = 0
        while taken < len(drawings):
            for hand in self._hands:
                if hand.task is None and given < min(len(drawings), taken + AHEAD * len(self._hands)):
                    hand.give(given, drawings[given])
                    given += 1
            busy = {hand.line: hand for hand in self._hands if hand.task is not None}
            for line in wait(list(busy)):
                number, picture = busy[line].take()  # type: ignore[index]
                done[number] = picture
            while taken in done:
                yield done.pop(taken)
                taken += 1

    def __enter__(self) -> "Studio":
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self._hands:
            hand.stop()


@dataclass
class _Hand:
    """One process that draws, replaced when it dies."""

    size: int
    kind: str
    seconds: float
    task: int | None = None

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        words = (other, self.size, self.kind, self.seconds)
        self.process: SpawnProcess = context.Process(target=_serve, args=words, daemon=True)
        self.process.start()
        other.close()  # or its end would never be seen

    def give(self, number: int, drawing: str) -> None:
        """Hand over one drawing; a process that died while idle is replaced."""
        self.task = number
        try:
            self.line.send(drawing)
        except OSError:
            self.process.join()
            self.__post_init__()
            self.line.send(drawing)

    def take(self) -> tuple[int, Picture]:
        """Return what became of the drawing."""
        assert self.task is not None, "nothing was given"
        number, self.task = self.task, None
        try:
            return number, Picture(*self.line.recv())
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.__post_init__()
            if code == -signal.SIGPROF:
                return number, Picture(b"", f"drawing takes more than {self.seconds:g} s of processor time")
            return number, Picture(b"", f"drawing crashes the renderer (exit code {code})")

    def stop(self) -> None:
        """End the process."""
        self.line.close()
        self.process.kill()
        self.process.join()


def _serve(line: Connection, size: int, kind: str, seconds: float) -> None:
    """Draw what comes down the line until it is closed."""
    leave_with_parent()
    # the kernel ends the process at the limit, in native code too; processor time: a busy machine changes nothing
    while True:
        try:
            drawing = line.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = (draw(drawing, size=size, kind=kind), "")
        except BaseException as error:  # a panic of the renderer is no Exception
            answer = (b"", f"drawing cannot be rendered ({error})"[:200])
        signal.setitimer(signal.ITIMER_PROF, 0)
        line.send(answer)


def draw(drawing: str, *, size: int, kind: str) -> bytes:
    """Return a drawing as a picture; what it refers to outside of itself is left out."""
    data = render(_OUTSIDE.sub('href=""', drawing), size)
    if kind == "png":
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(out, "WEBP", lossless=True, method=4)
    return out.getvalue()

"""Trouble for training runs on purpose: a hang, a slow disk, a full one, a damaged file. (The network: faults.py.)"""

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from pretrain.engine.writer import Block

write = Block.write


def asleep() -> None:
    """Where the stacks of a rank that hangs must point."""
    time.sleep(600)


def hang(module: nn.Module, call: int) -> None:
    """Let a module not come back from one of its forward calls, counted from 0."""
    calls = itertools.count()
    module.register_forward_pre_hook(lambda *_: asleep() if next(calls) == call else None)


def slow_disk(seconds: float) -> None:
    """Let each write of a part, and what is written after it, take longer, for the rest of this process."""

    def slowly(self: Block, path: Path, *, check: Callable[[], None]) -> Any:
        def check_slowly() -> None:
            time.sleep(seconds)
            check()

        return write(self, path, check=check_slowly)

    Block.write = slowly  # type: ignore[method-assign]
    fsync = os.fsync

    def late(file: int) -> None:
        time.sleep(seconds)
        fsync(file)

    os.fsync = late


@contextmanager
def held_disk(release: Path) -> Iterator[None]:
    """Let no part be written before the file `release` exists."""

    def held(self: Block, path: Path, *, check: Callable[[], None]) -> Any:
        while not release.exists():
            time.sleep(0.01)
        return write(self, path, check=check)

    with mock.patch.object(Block, "write", held):
        yield


@contextmanager
def full_disk() -> Iterator[None]:
    """Let the fsync of each part say that there is no space, as network disks do only then."""
    fsync = os.fsync

    def full(file: int) -> None:
        if "/part-" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with mock.patch.object(os, "fsync", full):
        yield


def damage(path: Path, kind: str) -> None:
    """Damage a file: "flip" a bit near its end, "cut" it, or "remove" it."""
    if kind == "remove":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data if kind == "flip" else data[:-7])

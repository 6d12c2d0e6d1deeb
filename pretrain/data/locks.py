"""File locks that end with their process, whatever ends it, and that a fork does not take along.

The kernel drops a `flock` when the last descriptor of it is closed. A forked worker inherits descriptors, so it would
keep its parent's locks after the parent's death: here, a fork closes them at once.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()
_guard = threading.Lock()  # no fork between opening a descriptor and noting it
_watching = False


def hold(path: Path, flags: int = os.O_RDWR) -> int | None:
    """Return a descriptor of a file that this process locks, None where another one has it.

    Raises:
        OSError: it cannot be opened, or its file system has no locks.
    """
    file = _open(path, flags)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release(file)
        return None
    except BaseException:
        release(file)
        raise
    return file


def release(file: int) -> None:
    """Close a descriptor, and with it its lock."""
    with _guard:
        _held.discard(file)
        os.close(file)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for a lock, hold it for the body."""
    file = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        release(file)


def _open(path: Path, flags: int) -> int:
    global _watching
    with _guard:
        if not _watching:
            os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_drop)
            _watching = True
        file = os.open(path, flags | os.O_CLOEXEC, 0o600)
        _held.add(file)
        return file


def _drop() -> None:
    for file in _held:
        os.close(file)  # the parent's lock stays: it has a descriptor of its own
    _held.clear()
    _guard.release()

"""A folder of downloads that never holds more than its bound; ranks, workers and runs of a machine share it.

    CACHE/<name>         whole and checked; the time of its last use is its mtime
    CACHE/<name>.part    being written; as long as its writer lives, the writer holds a lock on it
    CACHE/.lock          held while anything is made, renamed or removed
    CACHE/.growing       held by the one writer who does not know how long its file will be

There are no books that could go wrong: what is reserved is the length of the files themselves, as a .part is given its
full length before its first byte arrives. Whatever a killed process leaves is a .part without a lock, and the next one
who needs room removes it. A file may be removed while someone reads it: the reader's open file keeps the bytes.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain.data import locks
from pretrain.data.format import ShardError

PART = ".part"
STEP = 1 << 26  # a file of unknown length grows by so much at a time
PAUSE, LONGEST_PAUSE = 0.01, 0.25  # seconds between looks at what another process is doing


class Part:
    """A file that is being written, within what is reserved for it."""

    def __init__(self, cache: "Cache", path: Path, file: int, *, length: int | None) -> None:
        self._cache, self._path, self._file = cache, path, file
        self._grows = length is None
        self._reserved = length or 0
        self.offset = 0

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            ShardError: more than the cache may hold, or than fits on the disk.
        """
        end = self.offset + len(data)
        if end > self._reserved:
            assert self._grows, "a download checks its length before it writes"
            self._reserved = self._cache.grow(self._path, self._file, end)
        view = memoryview(data)
        with self._cache.told():
            while view:
                written = os.pwrite(self._file, view, self.offset)
                self.offset += written
                view = view[written:]

    def restart(self) -> None:
        """Forget all bytes; what is reserved stays so."""
        self.offset = 0


class Cache:
    """A bounded folder of files by name. Cheap to copy to another process.

    Raises:
        ShardError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        with self.told():
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass

    def find(self, name: str) -> IO[bytes] | None:
        """Return a file that is here, open, and note its use; None where it is not."""
        try:
            file = open(f"{self.folder}/{name}", "rb")  # noqa: SIM115 (the caller closes it)
            os.utime(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._sentence(error) from error
        return file

    def open(self, name: str, length: int | None, fill: Callable[[Part], None]) -> IO[bytes]:
        """Return a file, open; where it is not here, `fill` writes it, in one process at a time.

        With a length, a file of another length is an old one and is written anew. `fill` checks what it writes.

        Raises:
            ShardError: it cannot fit; and what `fill` raises.
        """
        if length is not None and length > self.limit:
            raise self._too_large(length)
        for pause in _pauses():
            file = self.find(name)
            if file is not None:
                if length is None or os.fstat(file.fileno()).st_size == length:
                    return file
                file.close()
                self.drop(name)
            with self._growing(length) as may:
                part = self._reserve(name, length) if may else None
                if part is not None:
                    return self._fill(name, part, length, fill)
            time.sleep(pause)
        raise AssertionError("pauses end")

    def has(self, name: str) -> bool:
        """Return whether a file is here, or being written (or was, by a process that is gone)."""
        return (self.folder / name).exists() or (self.folder / (name + PART)).exists()

    def drop(self, name: str) -> None:
        """Remove a file if it is here."""
        with self.told(), self._locked():
            (self.folder / name).unlink(missing_ok=True)

    def grow(self, path: Path, file: int, end: int) -> int:
        """Return the new reserved length of a .part, at least `end`, once there is room."""
        for pause in _pauses():
            if end > self.limit:
                raise self._too_large(end)
            with self.told(), self._locked():
                for wanted in (end + STEP, end):
                    if self._make_room(wanted, instead_of=path):
                        os.ftruncate(file, wanted)
                        return wanted
            time.sleep(pause)
        raise AssertionError("pauses end")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Give what goes wrong with the folder as a sentence."""
        try:
            yield
        except OSError as error:
            raise self._sentence(error) from error

    def _sentence(self, error: OSError) -> ShardError:
        return ShardError(
            f"cache {self.folder}: {error.strerror or error}; name a folder of a local disk with enough room in "
            "data.cache_dir, or lower data.cache_gb"
        )

    def _fill(self, name: str, file: int, length: int | None, fill: Callable[[Part], None]) -> IO[bytes]:
        path = self.folder / (name + PART)
        part = Part(self, path, file, length=length)
        try:
            fill(part)
            with self.told(), self._locked():
                os.ftruncate(file, part.offset)
            with self.told():
                os.fsync(file)  # before the name: a power cut must not leave zeros under it
                out = open(path, "rb")  # noqa: SIM115  (open before anyone may remove it: each download serves a read)
            with self.told(), self._locked():
                path.rename(self.folder / name)
            return out
        except BaseException:
            with self._locked():
                path.unlink(missing_ok=True)
            raise
        finally:
            locks.release(file)

    def _reserve(self, name: str, length: int | None) -> int | None:
        """Return a locked .part of the full length; None where another has it, or its file, or the room."""
        path = self.folder / (name + PART)
        with self.told(), self._locked():
            if (self.folder / name).exists() or (path.exists() and not self._reclaim(path)):
                return None
            if not self._make_room(length or 0):
                return None
            file = locks.hold(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            assert file is not None, "nobody else can have it before it is there"
            os.ftruncate(file, length or 0)
            return file

    def _make_room(self, wanted: int, instead_of: Path | None = None) -> bool:
        """Return whether `wanted` bytes fit now; the least recently used files go, but only if that is enough."""
        files: list[tuple[int, int, str]] = []
        held = 0
        for entry in os.scandir(self.folder):
            if entry.name.startswith(".") or entry.path == str(instead_of) or not entry.is_file(follow_symlinks=False):
                continue
            status = entry.stat()
            if not entry.name.endswith(PART):
                files.append((status.st_mtime_ns, status.st_size, entry.path))
            elif not self._reclaim(Path(entry.path)):
                held += status.st_size
        if held + wanted > self.limit:
            return False
        total = held + wanted + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            os.unlink(path)
            total -= size
        return True

    @staticmethod
    def _reclaim(path: Path) -> bool:
        """Remove a .part whose writer is gone; return whether it was."""
        file = locks.hold(path)
        if file is None:
            return False
        try:
            path.unlink()
        finally:
            locks.release(file)
        return True

    @contextmanager
    def _growing(self, length: int | None) -> Iterator[bool]:
        """Two files that grow could each wait for the other's room for ever: one at a time."""
        if length is not None:
            yield True
            return
        with self.told():
            file = locks.hold(self.folder / ".growing", os.O_RDWR | os.O_CREAT)
        try:
            yield file is not None
        finally:
            if file is not None:
                locks.release(file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with locks.locked(self.folder / ".lock"):
            yield

    def _too_large(self, length: int) -> ShardError:
        return ShardError(
            f"cache {self.folder}: a file of {length:,} bytes is larger than data.cache_gb allows "
            f"({self.limit:,} bytes); raise data.cache_gb, or set data.range_reads=true to cache no shards"
        )


def _pauses() -> Iterator[float]:
    pause = PAUSE
    while True:
        yield pause
        pause = min(1.5 * pause, LONGEST_PAUSE)

"""Claim an output folder: one writer at a time, and nothing left lying by a writer that was killed."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.config import ConfigError
from pretrain.data.format import ShardError

STATE = ".build"  # what a writer remembers between runs


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """Make the folder, lock it while the block runs, clear unfinished files; yield the folder of states.

    Raises:
        ConfigError: the name is taken by something that is not a folder.
        ShardError: another process is writing there.
    """
    try:
        (out / STATE).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out}: there is a file of that name or above it; name a folder") from None
    with open(out / STATE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process dies
        except OSError:
            raise ShardError(f"{out}: another build is writing there; wait for it, or name another --out") from None
        for folder in (out, out / STATE):
            for part in folder.glob(".*.part"):
                part.unlink(missing_ok=True)
        yield out / STATE

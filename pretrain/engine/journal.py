"""The files of a run that grow by a line at a time: added to, cut back, and out of reach of earlier starts of the run.

A process that was stopped or cut off may wake up in the middle of a write, after its last look at the run folder's
token. So a new start gives each such file the place of a copy (`renew`), once it owns the folder: what an older start
still writes through a file that it has open goes to one without a name. Who opens a file for one line opens it before
it looks at the token (`append`): either it sees the new token, or its file is the old one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pretrain.data.format import write_atomic


def append(path: Path, line: dict[str, Any], *, check: Callable[[], None]) -> None:
    """Add a line to a JSONL file so that it survives a power cut; `check` raises where the file is another's by now."""
    with open(path, "a", encoding="utf-8") as file:
        check()
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file; a torn last one is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def truncate(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file beyond `step` (and a torn last one), so that a resumed run repeats none."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
    write_atomic(path, b"".join(kept))


def renew(paths: Iterable[Path], *, beside: Path) -> None:
    """Put copies in the place of files; the copies are made in the folder `beside`, which readers of logs do not watch.

    Raises:
        OSError: a file cannot be copied.
    """
    for number, path in enumerate(paths):
        part = beside / f".log.{os.urandom(6).hex()}.{number}.part"
        try:
            shutil.copy2(path, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

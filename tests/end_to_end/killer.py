"""Kills one rank of a run with kill -9 as soon as the run has written so much: lines of a file, or files of a folder.

    python tests/end_to_end/killer.py NAME RANK COUNT FILE.jsonl          prints the processes that worked for the rank
    python tests/end_to_end/killer.py NAME RANK COUNT FOLDER SUFFIX

A process of its own, which nothing in a busy test process holds up: a tiny run's steps take milliseconds. It is started
with the launcher, so it knows the rank's process long before the kill is due. Only the standard library is imported.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PRETRAIN, FINETUNE = "pretrain/main.py", "finetune/main.py"


def of_rank(run: str, rank: int) -> list[int]:
    """Return the processes that train `run` as this rank, or work for it, in the order in which they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words, variables = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        # [python, -u, SCRIPT]: a launcher, which may have a RANK of its own, names the script further back
        trains = {PRETRAIN.encode(), FINETUNE.encode()} & set(words[1:3])
        if trains and f"run.name={run}".encode() in words and f"RANK={rank}".encode() in variables:
            found.append(int(entry.name))
    return sorted(found)


def written(path: Path, suffix: str = "") -> int:
    """Return the lines of a file, or where a suffix is given the files in a folder that end so."""
    if suffix:
        return sum(1 for _ in path.rglob(f"*{suffix}"))
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(found: Callable[[], int], least: int, pause: float) -> int:
    """Return what is found once that is so much."""
    while (now := found()) < least:
        time.sleep(pause)
    return now


def main(run: str, rank: int, count: int, path: Path, suffix: str = "") -> None:
    """Wait, kill, and print the processes that are left of the rank."""
    trainer = until(lambda: next(iter(of_rank(run, rank)), 0), 1, 0.1)
    until(lambda: written(path, suffix), count, 0.001)
    os.kill(trainer, signal.SIGKILL)
    print(*(pid for pid in of_rank(run, rank) if pid != trainer))


if __name__ == "__main__":
    name, number, least, where, *ending = sys.argv[1:]
    main(name, int(number), int(least), Path(where), *ending)

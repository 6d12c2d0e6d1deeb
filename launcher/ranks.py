"""The ranks below a launcher, found in /proc: deepspeed and torchrun do not pass signals on, they die of them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress


def children(proc: str = "/proc") -> dict[int, list[int]]:
    """Return the children of each process."""
    out: dict[int, list[int]] = {}
    for name in os.listdir(proc) if os.path.isdir(proc) else ():
        if not name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            with open(f"{proc}/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])  # a name may hold spaces and brackets
            out.setdefault(parent, []).append(int(name))
    return out


def _is_rank(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(pair.startswith(b"LOCAL_RANK=") for pair in file.read().split(b"\0"))
    except OSError:
        return False


def below(pid: int) -> list[int]:
    """Return the rank processes below a launcher: the topmost that were started with a LOCAL_RANK."""
    tree, found, look = children(), [], [pid]
    while look:
        process = look.pop()
        if process != pid and _is_rank(process):
            found.append(process)  # what is below is a loader worker of it, which the rank tells itself
        else:
            look += tree.get(process, [])
    return sorted(found)


def send(pid: int, number: int) -> list[int]:
    """Send a signal to the ranks below a launcher, or to the process itself where it has none; return who got it."""
    targets = below(pid) or [pid]
    reached = []
    for target in targets:
        with suppress(OSError):
            os.kill(target, number)
            reached.append(target)
    return reached


def end_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to everything in the process group that a launcher leads."""
    with suppress(OSError):
        os.killpg(pid, number)

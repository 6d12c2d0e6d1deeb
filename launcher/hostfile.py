"""Lists of machines: DeepSpeed's hostfile (`node1 slots=8`) and SLURM's short form (`node[001-003,7],login`)."""

from __future__ import annotations

import re

from launcher.job import JobError

_LINE = re.compile(r"^(?P<host>[^\s#]+)(?:\s+slots\s*=\s*(?P<slots>\d+))?$")
_RANGE = re.compile(r"^(?P<low>\d+)(?:-(?P<high>\d+))?$")


def parse(text: str, where: str = "hostfile") -> list[tuple[str, int]]:
    """Return (host, slots) of each line; a host without slots has one. Comments and empty lines are skipped.

    Raises:
        JobError: a line that is none of these, a host given twice, no host at all.
    """
    out: list[tuple[str, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.partition("#")[0].strip()
        if not bare:
            continue
        found = _LINE.match(bare)
        if not found:
            raise JobError(f"{where} line {number}: {bare!r}; write it as `node1 slots=8`")
        host, slots = found["host"], int(found["slots"] or 1)
        if slots < 1:
            raise JobError(f"{where} line {number}: {host} has no slot; leave it out or give slots=1 or more")
        if host in dict(out):
            raise JobError(f"{where} line {number}: {host} is there twice; add its slots up in one line")
        out.append((host, slots))
    if not out:
        raise JobError(f"{where}: names no machine; write one line a machine, as `node1 slots=8`")
    return out


def read(path: str) -> list[tuple[str, int]]:
    """Return (host, slots) of each machine in a file.

    Raises:
        JobError: unreadable, or not a hostfile.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"hostfile {path}: cannot be read ({error})") from error
    return parse(text, path)


def write(hosts: list[tuple[str, int]]) -> str:
    """Return the text of a hostfile."""
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts)


def _names(nodes: str) -> list[str]:
    """Cut at the commas that are not in brackets."""
    out, depth, start = [], 0, 0
    for at, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            out.append(nodes[start:at])
            start = at + 1
    return [name for name in (*out, nodes[start:]) if name]


def expand(nodes: str) -> list[str]:
    """Return the hosts of SLURM's short form, in its order: a[08-10,3]x,b -> a08x a09x a10x a3x b.

    Raises:
        JobError: brackets that do not close, or no number in them.
    """
    out = []
    for name in _names(nodes):
        head, bracket, rest = name.partition("[")
        if not bracket:
            out.append(name)
            continue
        inside, closed, tail = rest.partition("]")
        tails = expand(tail) if tail else [""]
        for piece in inside.split(","):
            found = _RANGE.match(piece)
            if not (found and closed):
                raise JobError(f"node list {nodes!r}: cannot be read; expected something like node[001-004,7]")
            low, high = found["low"], found["high"] or found["low"]
            numbers = range(int(low), int(high) + 1)
            out += [f"{head}{number:0{len(low)}d}{end}" for number in numbers for end in tails]
    return out


def counts(text: str) -> list[int]:
    """Return SLURM's short form of one number a node: 2(x3),1 -> 2 2 2 1.

    Raises:
        JobError: not of this form.
    """
    out: list[int] = []
    for piece in text.split(","):
        found = re.match(r"^(\d+)(?:\(x(\d+)\))?$", piece)
        if not found:
            raise JobError(f"tasks per node {text!r}: cannot be read; expected something like 2(x3),1")
        out += [int(found[1])] * int(found[2] or 1)
    return out

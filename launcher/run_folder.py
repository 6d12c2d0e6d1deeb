"""What the folder of a run says: how far it has come, which start owns it, and the record of its starts and ends.

    RUN/launches.jsonl    one line a start or end: {"time", "event", "host", "code", "step", "saved", "verdict", ...}

It is written by the launcher; what it reads beside it by the run itself (pretrain/engine/run_folder.py).
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from typing import Any, Iterable, NamedTuple

from launcher.job import JobError

RECORD = "launches.jsonl"
_STEP = re.compile(r"\bstep (\d+)/(\d+)\b|: (\d+) of (\d+) steps are done")
_TAIL = 65536  #: bytes; the last lines of a log that may be large


class Progress(NamedTuple):
    """How far a run has come."""

    step: int  #: last one that was reported, 0 where none was
    steps: int  #: of the whole run, 0 where not known
    saved: int  #: of the newest complete checkpoint, -1 where there is none
    finished: bool  #: the newest checkpoint is that of the last step


def of(config: str, overrides: Iterable[str], folder: str = ".") -> str:
    """Return the folder of the run that a config and overrides name, without a YAML library: only `run:` is read.

    Raises:
        JobError: run.name is nowhere.
    """
    section = _run_section(os.path.join(folder, config))
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("run.name", "run.dir"):
            section[key[4:]] = _scalar(value)
    if "name" not in section:
        raise JobError(f"{config}: run.name is not in its run: section; give it on the command line, as run.name=first")
    return os.path.normpath(os.path.join(folder, section.get("dir", "runs"), section["name"]))


def _scalar(text: str) -> str:
    text = text.strip()
    if text[:1] in ("'", '"'):
        return text[1:].partition(text[0])[0]
    return re.split(r"\s#", text)[0].strip()


def _run_section(path: str) -> dict[str, str]:
    """Read `run: {name: a, dir: b}` or the indented lines below `run:`."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"config {path}: cannot be read ({error})") from error
    start = next((at for at, line in enumerate(lines) if re.match(r"run\s*:", line)), None)
    if start is None:
        return {}
    block = [lines[start].partition(":")[2]]
    for line in lines[start + 1 :]:
        if line.strip() and not line[0].isspace() and line[0] not in "#}":
            break
        block.append(line)
    inside = re.split(r"[{},\n]", "\n".join(line for line in block if not line.lstrip().startswith("#")))
    pairs = (piece.partition(":") for piece in inside)
    return {key.strip(): _scalar(value) for key, colon, value in pairs if colon and key.strip() in ("name", "dir")}


def _tail(path: str) -> list[str]:
    """Return the last lines of a file, [] where it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def metrics(run: str) -> list[dict[str, Any]]:
    """Return the last lines of metrics.jsonl; a torn one is left out."""
    out = []
    for line in _tail(os.path.join(run, "metrics.jsonl")):
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict) and "step" in tree:
            out.append(tree)
    return out


def newest_checkpoint(run: str) -> tuple[str, int]:
    """Return path and step of the newest complete checkpoint, ("", -1) where there is none."""
    folder = os.path.join(run, "checkpoints")
    try:
        names = sorted((name for name in os.listdir(folder) if re.match(r"^step-\d+$", name)), reverse=True)
    except OSError:
        return "", -1
    for name in names:
        if os.path.exists(os.path.join(folder, name, "COMPLETE")):
            return os.path.join(folder, name), int(name[5:])
    return "", -1


def progress(run: str) -> Progress:
    """Return how far a run has come."""
    reported = metrics(run)
    step = int(reported[-1]["step"]) if reported else 0
    totals = [found for line in _tail(os.path.join(run, "log.txt")) for found in _STEP.findall(line)]
    steps = int(totals[-1][1] or totals[-1][3]) if totals else 0
    saved = newest_checkpoint(run)[1]
    return Progress(max(step, saved, 0), steps, saved, 0 < steps <= saved)


def owner(run: str) -> str | None:
    """Return which launch the run's last start belongs to: DIPTYCH_LAUNCH of its ranks, "" where it had no launcher.

    None where it cannot be read: a disk that hiccups has not given the run to anybody.
    """
    try:
        with open(os.path.join(run, "environment.json"), encoding="utf-8") as file:
            return str(json.load(file).get("launch") or "")
    except (OSError, ValueError, AttributeError):
        return None


def stopped_by_signal(run: str, since: float) -> bool:
    """Return whether the newest checkpoint was written after `since` (unix time) by a run that was asked to stop."""
    path = newest_checkpoint(run)[0]
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            owed = bool(json.load(file).get("hooks_owed"))
        return owed and os.path.getmtime(os.path.join(path, "COMPLETE")) >= since
    except (OSError, ValueError, AttributeError):
        return False


def record(run: str, **facts: Any) -> None:
    """Append a line to the run's record of starts and ends, where the run has a folder."""
    if not os.path.isdir(run):
        return
    line = {"time": round(time.time(), 3), "host": socket.gethostname(), **facts}
    with open(os.path.join(run, RECORD), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def launches(run: str) -> list[dict[str, Any]]:
    """Return the record of starts and ends."""
    out = []
    for line in _tail(os.path.join(run, RECORD)):
        try:
            out.append(json.loads(line))
        except ValueError:  # torn by a power cut
            continue
    return out

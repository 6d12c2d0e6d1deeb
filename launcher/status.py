"""`status`: how far runs have come, how fast, what happened to them, and what waits in the queue."""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import time
from typing import Any

from launcher import run_folder, slurm
from launcher.job import JobError
from launcher.verdict import FAILURES

HELP = (
    "Show step, loss, speed, time left and restarts of runs from their folders, and the SLURM queue where there is one."
)
EXAMPLE = """examples:
  python -m launcher status runs/clip_iconcaps
  watch -n 10 python -m launcher status runs/*"""
QUIET = 10  #: a run that has not reported for so many times its usual pause is said to be silent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of `status`."""
    parser.add_argument("run_folder", nargs="*", metavar="RUN", help="folders of runs (default: all in ./runs)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    folders = args.run_folder or _all_runs("runs")
    for folder in folders:
        print(describe(folder, now=time.time()))
    if shutil.which("squeue"):
        print(queue())
    elif not folders:
        raise JobError("no run in ./runs and no SLURM here; give the folder of a run")
    return 0


def _all_runs(parent: str) -> list[str]:
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return []
    return [os.path.join(parent, name) for name in names if os.path.isfile(os.path.join(parent, name, "config.yaml"))]


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def describe(run: str, *, now: float) -> str:
    """Return a few lines about a run.

    Raises:
        JobError: no run.
    """
    if not os.path.isdir(run):
        raise JobError(f"{run}: no such folder; give the folder of a run, such as runs/clip_iconcaps")
    progress, reported = run_folder.progress(run), run_folder.metrics(run)
    steps = f"/{progress.steps}" if progress.steps else ""
    head = f"{run}: step {progress.step}{steps}"
    if progress.steps:
        head += f" ({100 * progress.step / progress.steps:.0f} %)"
    lines = [head]
    if reported:
        lines.append("  " + _speed(reported, progress, now))
    path, step = run_folder.newest_checkpoint(run)
    lines.append(f"  last checkpoint: step {step} ({path})" if path else "  no checkpoint yet")
    lines.append("  " + _history(run_folder.launches(run), now))
    return "\n".join(lines)


def _speed(reported: list[dict[str, Any]], progress: run_folder.Progress, now: float) -> str:
    last = reported[-1]
    words = [f"loss {last['loss']:.4f}"] if "loss" in last else []
    if "samples_per_s" in last:
        words.append(f"{last['samples_per_s']:.1f} samples/s")
    if progress.finished:
        return "  ".join([*words, "finished"])
    if progress.steps and "step_time" in last:
        words.append(f"ETA {clock((progress.steps - last['step']) * last['step_time'])}")
    if "time" in last:
        age = now - last["time"]
        pause = last["time"] - reported[-2]["time"] if len(reported) > 1 and "time" in reported[-2] else 0
        words.append(f"reported {clock(age)} ago" + (": silent" if pause and age > QUIET * max(pause, 1) else ""))
    return "  ".join(words)


def _history(record: list[dict[str, Any]], now: float) -> str:
    """Return what the record of starts and ends says in one line."""
    starts = sum(line.get("event") == "start" for line in record)
    ends = [line for line in record if line.get("event") == "end"]
    if not starts:
        return "not started by this launcher: restarts are in log.txt"
    failed = sum(line.get("verdict") in FAILURES for line in ends)
    text = (
        f"{max(0, len(ends) - 1 if record[-1].get('event') == 'end' else len(ends))} restarts, {failed} after a failure"
    )
    if ends:
        last = ends[-1]
        when = clock(now - last.get("time", now))
        text += f"; last end {when} ago: {last.get('verdict')} (code {last.get('code')}) at step {last.get('step')}"
    return text


def queue() -> str:
    """Return this user's jobs as a table, or why it is not known."""
    try:
        rows = slurm.queue(user=getpass.getuser())
    except slurm.SlurmError as error:
        return f"queue: not known ({error})"
    if not rows:
        return "queue: nothing"
    table = [("job", "name", "state", "time", "left", "nodes", "where"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(7)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)

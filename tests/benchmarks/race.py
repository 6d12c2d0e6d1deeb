"""A race between programs: each lives in a process of its own, laps are interleaved, and CPU time is what counts.

On a machine that does other things at the same time wall time says little; user + system time of a process that runs
one thread says how many samples a core gives. Speeds of a virtual machine drift over minutes: laps take turns.

A contestant is a script that builds what it needs and then calls `contest(lap)`; `lap` returns the samples it has done.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}


def contest(lap: Callable[[], int]) -> None:
    """Run a lap for every line that comes in; say how many samples it did and what they cost."""
    lap()  # caches, lazy imports
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        samples = lap()
        print(json.dumps([samples, time.process_time() - cpu, time.perf_counter() - wall]), flush=True)


class Result(NamedTuple):
    """The laps of one contestant."""

    rates: list[float]  #: samples per second of CPU time

    @property
    def median(self) -> float:
        """The lap in the middle."""
        return statistics.median(self.rates)

    def __str__(self) -> str:
        return f"{self.median:,.0f} [{min(self.rates):,.0f}, {max(self.rates):,.0f}]"


def race(contestants: Mapping[str, Sequence[str]], *, laps: int) -> dict[str, Result]:
    """Start all, then let them run in turn, `laps` times; return their results by name.

    Raises:
        RuntimeError: one ended early; its own words are on stderr.
    """
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    running = {
        name: subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name, command in contestants.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in running}
    try:
        for name, process in running.items():
            _answer(name, process, until="ready")
        for lap in range(laps):
            for name, process in running.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                samples, cpu, _ = json.loads(_answer(name, process))
                rates[name].append(samples / cpu)
                print(f"  lap {lap + 1}/{laps}  {name:32s} {samples / cpu:12,.0f} samples/s/core", flush=True)
    finally:
        for process in running.values():
            process.stdin.close()
            process.wait()
    return {name: Result(found) for name, found in rates.items()}


def _answer(name: str, process: subprocess.Popen, *, until: str | None = None) -> str:
    while line := process.stdout.readline():
        if until is None or line.strip() == until:
            return line
    raise RuntimeError(f"{name} ended with code {process.wait()}")


def machine() -> str:
    """Return cores, processor and the versions that matter, in a line."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else 'unknown processor'}"

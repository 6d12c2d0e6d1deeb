"""Runs under the real deepspeed launcher: started on two ranks, one killed with kill -9, and what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from tests.ranks import a_port

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN, FINETUNE = "pretrain/main.py", "finetune/main.py"


def launch(
    config: Path, *words: str, launcher: tuple[str, ...] = (), script: str = PRETRAIN, lane: int = 0, **variables: str
) -> subprocess.Popen:
    """Start a script of training; with no `launcher` named it is deepspeed, on two ranks, in a `lane` of ports."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    launcher = launcher or ("deepspeed", "--num_gpus", "2", "--master_port", a_port(lane))
    command = [*launcher, script, "--config", str(config), *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(run: Path) -> dict:
    """Return everything that the newest checkpoint's parts hold."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {f"{p.name}:{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def kill_a_rank(launched: subprocess.Popen, run: str, rank: int, *, when: Callable[[], bool]) -> None:
    """Kill one rank of `run` as soon as `when` says so, and wait until the launcher and all that it started have ended.

    Raises:
        AssertionError: the run had ended before, or what was left of it did not.
    """
    deadline, trainer = time.monotonic() + 600, 0
    while not (trainer and when()):
        assert launched.poll() is None and time.monotonic() < deadline, launched.stdout.read()
        if not trainer:  # looked for before the kill is due: a tiny model takes many steps while one looks
            trainer = next(iter(_of_rank(run, rank)), 0)
        time.sleep(0.002 if trainer else 0.1)
    os.kill(trainer, signal.SIGKILL)
    workers = [pid for pid in _of_rank(run, rank) if pid != trainer]
    launched.communicate(timeout=100)
    assert launched.returncode != 0, "the run had ended before"
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they notice within seconds
        assert time.monotonic() < deadline, f"still there: {workers}"
        time.sleep(0.1)


def _of_rank(run: str, rank: int) -> list[int]:
    """Return the processes that train `run` as this rank, or work for it, in the order in which they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words, variables = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        started = {PRETRAIN.encode(), FINETUNE.encode()} & set(words) and b"-m" not in words  # not by the launcher
        if started and f"run.name={run}".encode() in words and f"RANK={rank}".encode() in variables:
            found.append(int(entry.name))
    return sorted(found)

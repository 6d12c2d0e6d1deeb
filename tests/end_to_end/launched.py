"""Runs under the real deepspeed launcher: started on two ranks, one killed with kill -9, and what they leave."""

import os
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from launcher import world
from tests.end_to_end.killer import PRETRAIN
from tests.ranks import a_port

ROOT = Path(__file__).resolve().parents[2]
KILLER = Path(__file__).with_name("killer.py")


def launch(
    config: Path, *words: str, launcher: tuple[str, ...] = (), script: str = PRETRAIN, lane: int = 0, **variables: str
) -> subprocess.Popen:
    """Start a script of training; with no `launcher` named it is deepspeed, on two ranks, in a `lane` of ports."""
    env = world.outside(os.environ)  # a test process that has trained is a rank itself
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    launcher = launcher or ("deepspeed", "--num_gpus", "2", "--master_port", a_port(lane))
    command = [*launcher, script, "--config", str(config), *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(run: Path) -> dict:
    """Return everything that the newest checkpoint's parts hold."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {f"{p.name}:{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def kill_a_rank(launched: subprocess.Popen, run: str, rank: int, *, when: tuple[int, Path, str]) -> None:
    """Kill one rank of `run` when so much is written (killer.py); wait until all that the launcher started have ended.

    Args:
        launched: the run, just started.
        run: its name.
        rank: whom to kill.
        when: a count, and the file whose lines or the folder whose files of a suffix are counted.

    Raises:
        AssertionError: the run had ended before, or what was left of it did not.
    """
    command = [sys.executable, "-I", "-S", str(KILLER), run, str(rank), *(str(one) for one in when if one != "")]
    killer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while launched.poll() is None and killer.poll() is None:
            assert time.monotonic() < deadline, "the kill is not due yet"
            time.sleep(0.1)
        output = launched.communicate(timeout=100)[0]
        assert launched.returncode != 0, f"the run had ended before:\n{output}"
        workers = killer.communicate(timeout=20)[0].split()
    finally:
        killer.kill()
    assert killer.returncode == 0, f"the run ended before it was killed:\n{output}"
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they notice within seconds
        assert time.monotonic() < deadline, f"still there: {workers}"
        time.sleep(0.1)

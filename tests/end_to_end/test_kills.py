"""kill -9 under the shipped demo config: one rank dies at a random step, the same command goes on, nothing differs.

On the real data where `make demo` has built it, otherwise on made-up shapes with a tiny model; a line says which.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.jobs import losses, pretrain, steps_done
from tests.end_to_end.test_pretrain import ROOT, launch, ranks_of, weights

STEPS, EVERY = 24, 6


@pytest.mark.slow
def test_a_rank_killed_at_a_random_step_changes_nothing(ranks, demo_config: Path, tmp_path: Path) -> None:
    """Bit-equal weights, moments and losses, beside a run that no launcher started."""
    words = (
        f"run.dir={tmp_path / 'runs'}", f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}",
        "checkpoint.keep_last=9", "monitor.log_every=1", "data.workers=1", "evals={}",
    )  # fmt: skip
    assert ranks.run(2, pretrain, demo_config, "run.name=whole", *words) == [0, 0]
    rng = random.Random(20)
    step, victim = rng.randint(EVERY + 1, STEPS - 2), rng.randint(0, 1)
    broken = launch(demo_config, "run.name=broken", *words)
    run = tmp_path / "runs" / "broken"
    deadline = time.monotonic() + 300
    while steps_done(run) < step:
        assert broken.poll() is None and time.monotonic() < deadline, broken.stdout.read()
        time.sleep(0.01)
    trainers = [pid for pid in ranks_of(broken, "broken") if is_rank(pid, victim)]  # and its worker, a fork of it
    os.kill(min(trainers), signal.SIGKILL)
    assert broken.wait(timeout=100) != 0
    assert steps_done(run) < STEPS, "the kill came after the end"
    gone_by(trainers, time.monotonic() + 20)
    again = launch(demo_config, "run.name=broken", *words)
    output = again.communicate(timeout=400)[0]
    assert again.returncode == 0, output
    assert "resumed from" in output
    theirs, ours = weights(tmp_path / "runs" / "whole"), weights(run)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert losses(run) == losses(tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_three_kills_at_random_moments_saves_included() -> None:
    command = [sys.executable, "-m", "tests.soak.kills", "--kills", "3", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout


def is_rank(pid: int, rank: int) -> bool:
    """Return whether a process trains as this rank, or works for it."""
    try:
        return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def gone_by(pids: list[int], deadline: float) -> None:
    """Wait until processes have ended; workers notice within seconds that their rank is dead."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.1)

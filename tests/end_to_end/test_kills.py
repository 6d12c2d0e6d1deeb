"""kill -9 under the shipped demo config: one rank dies at a random step, the same command goes on, nothing differs.

On the real data where `make demo` has built it, otherwise on made-up shapes with a tiny model; a line says which.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.jobs import losses, pretrain, steps_done
from tests.end_to_end.launched import ROOT, kill_a_rank, launch, weights

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
    kill_a_rank(broken, "broken", victim, when=(step, run / "metrics.jsonl", ""))
    assert steps_done(run) < STEPS, "the kill came after the end"
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

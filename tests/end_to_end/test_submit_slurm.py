"""submit, status and resume on a real SLURM cluster: a run is sent, looked at, stopped, sent again and finishes."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import run_folder
from tests import tiny
from tests.cluster.machine import until
from tests.cluster.slurm import Cluster
from tests.cluster.work import environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_cluster")]
STEPS = 400


def launcher(cluster: Cluster, *words: str | Path) -> str:
    """Return what the launcher prints on the login machine."""
    line = (sys.executable, "-m", "launcher", *words)
    done = subprocess.run(cluster.login.words(*line), capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_is_submitted_looked_at_and_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    config, run = tiny.config_file(tmp_path), str(tmp_path / "runs" / "sent")
    options = ("--nodes", "2", "--name", "sent", "--time", "20", "--output", str(tmp_path / "log"))
    words = (f"run.dir={tmp_path}/runs", "run.name=sent", f"train.steps={STEPS}", "data.workers=0", "evals={}")
    said = launcher(cluster, "submit", *options, config, *words, "checkpoint.every_steps=50", "monitor.log_every=1")
    number = said.split()[-1]
    until(lambda: run_folder.progress(run).step > 20, 120, lambda: (tmp_path / "log").read_text())
    until(lambda: run_folder.launches(run), 60, "no start on record")  # the launcher looks every few seconds
    status = launcher(cluster, "status", run)
    assert f"/{STEPS} (" in status and "ETA" in status and "0 restarts" in status
    assert any({number, "sent", "RUNNING"} <= set(line.split()) for line in status.splitlines()), status
    cluster.cancel(number)
    cluster.ended(number)
    cluster.all_idle()
    stopped = run_folder.progress(run)
    assert 20 < stopped.saved == stopped.step < STEPS, "scancel gives time for a save"
    said = launcher(cluster, "resume", run)
    assert "--nodes=2 --ntasks-per-node=1 --job-name=sent --time=20" in said
    job = cluster.ended(said.split()[-1])
    assert job["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert run_folder.progress(run).finished
    assert "finished" in launcher(cluster, "status", run)

"""The command line: help with examples, usage errors in one sentence, and whole runs of the real program."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import ranks, run_folder
from launcher.__main__ import COMMANDS, main
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m launcher {name}" in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "none.yaml"], "error: config none.yaml: no such file"),
        (["run", "none.yaml", "--with", "srun"], "error: config none.yaml"),
        (["submit", "none.yaml", "--dry-run"], "error: config none.yaml"),
        (["status", "none"], "error: none: no such folder"),
        (["resume", "none"], "error: none: no such folder"),
        (["doctor", "--hostfile", "none"], "error: hostfile none: cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(said)


def test_srun_outside_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "c.yaml").write_text("run: {name: a}")
    assert main(["run", "--with", "srun", str(tmp_path / "c.yaml")]) == 2
    assert "not in a SLURM job" in capsys.readouterr().err


def test_a_dry_run_shows_environment_and_command(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "c.yaml").write_text("run: {name: a}")
    assert main(["run", "c.yaml", "--dry-run", "a.b=1", "--ranks-per-node", "2"]) == 0
    text = capsys.readouterr().err
    assert "OMP_NUM_THREADS=3  (as it was set)" in text
    assert "--num_gpus 2" in text and text.endswith("main.py --config c.yaml a.b=1\n")
    assert not (tmp_path / "runs").exists()


def test_in_a_slurm_job_its_nodes_and_tasks_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("run: {name: a}")
    job = {"JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NTASKS": "4", "TASKS_PER_NODE": "2(x2)", "CPUS_ON_NODE": "8"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("RANK", "3")  # submitted from within another launcher
    assert main(["run", "c.yaml", "--dry-run"]) == 0
    text = capsys.readouterr().err
    assert "srun --nodes=2 --ntasks=4 --ntasks-per-node=2" in text
    assert "MASTER_ADDR=n1 MASTER_PORT=20007" in text


def start(*words: str, cwd: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-m", "launcher", *words)
    return subprocess.Popen(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while run_folder.progress(str(run)).step < step:
        assert child.poll() is None and time.monotonic() < deadline, child.stdout.read()
        time.sleep(0.02)


def ask_to_save(child: subprocess.Popen, run: Path) -> run_folder.Progress:
    """Send what SLURM sends before a time limit; return how far the run has come."""
    child.send_signal(signal.SIGUSR1)
    said = child.communicate(timeout=200)[0]
    assert child.returncode == 85, said
    assert "passed on to 2 processes" in said and "launcher: stopped (exit code" in said
    found = run_folder.progress(str(run))
    assert found.saved == found.step < found.steps, "not a step is lost that was made before the signal"
    return found


@pytest.mark.slow
def test_a_real_run_is_seen_through(tmp_path: Path) -> None:
    """A rank of deepspeed is killed: it starts again. Asked to stop, it saves, also by torchrun; `resume` ends it."""
    config, steps = tiny.config_file(tmp_path), 160
    run = tmp_path / "runs" / "seen"
    words = (
        f"run.dir={run.parent}", "run.name=seen", f"train.steps={steps}", "checkpoint.every_steps=10",
        "monitor.log_every=1", "monitor.tensorboard=false", "data.workers=0", "evals={}",
    )  # fmt: skip
    options = ("--ranks-per-node", "2", "--first-wait", "0.1", str(config), *words)
    child = start("run", "--with", "deepspeed", *options, cwd=tmp_path)
    wait_for_step(run, 15, child)
    os.kill(ranks.below(child.pid)[1], signal.SIGKILL)
    while "resumed from" not in (run / "log.txt").read_text():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    wait_for_step(run, run_folder.progress(str(run)).step + 5, child)  # it is training
    first = ask_to_save(child, run)
    child = start("run", "--with", "torchrun", *options, cwd=tmp_path)
    wait_for_step(run, first.saved + 5, child)
    second = ask_to_save(child, run)
    again = start("resume", str(run), cwd=tmp_path.parent)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert f"goes on from {run}/checkpoints/step-{second.saved:08d}" in said and "torch.distributed.run" in said
    assert run_folder.progress(str(run)).finished
    ends = [line["verdict"] for line in run_folder.launches(str(run)) if line["event"] == "end"]
    assert ends == ["crashed", "stopped", "stopped", "done"]
    steps_seen = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps_seen == list(range(1, steps + 1))

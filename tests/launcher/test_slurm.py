"""What is said to SLURM and read from it; the real one is in tests/end_to_end/test_slurm*.py."""

import dataclasses
from pathlib import Path

import pytest

from launcher import resume, slurm
from launcher.__main__ import main
from launcher.job import ROOT, Job
from launcher.slurm import Queued, SlurmError, Wishes

JOB = Job("c.yaml", ("a.b=1",), kind="srun", nodes=2, ranks_per_node=8)


def test_a_bare_line() -> None:
    job = dataclasses.replace(JOB, sbatch=slurm.options(JOB, Wishes()))
    words = ["sbatch", "--nodes=2", "--ntasks-per-node=8", f"{ROOT}/slurm/pretrain.sbatch", "c.yaml", "a.b=1"]
    assert slurm.sbatch_line(job) == words


def test_wishes() -> None:
    wishes = Wishes(name="x", time="1:00:00", gpus_per_node=8, signal_seconds=600, extra=("--exclusive",))
    said = slurm.options(JOB, wishes)
    assert said[2:] == ("--job-name=x", "--time=1:00:00", "--gpus-per-node=8", "--signal=B:USR1@600", "--exclusive")


def test_the_queue() -> None:
    text = "7|run a|RUNNING|1:00|2:00|2|n[1-2]\n8|b|PENDING|0:00|1:00|1|(Resources)\nslurm: noise\n"
    assert slurm.parse_queue(text) == [
        Queued("7", "run a", "RUNNING", "1:00", "2:00", "2", "n[1-2]"),
        Queued("8", "b", "PENDING", "0:00", "1:00", "1", "(Resources)"),
    ]


def test_no_slurm_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="squeue is not on this machine"):
        slurm.queue(user="me")


def test_a_refusal_is_slurms_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: x >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SlurmError, match="invalid partition specified: x"):
        slurm.submit(JOB)


def test_a_run_of_a_job_is_submitted_again_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "c.yaml").write_text("run: {name: a}")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    job = dataclasses.replace(JOB, folder=str(tmp_path), sbatch=("--nodes=2", "--time=3"))
    resume.remember("runs/a", job)
    assert main(["resume", "runs/a", "train.steps=9", "--dry-run"]) == 0
    line = f"sbatch --nodes=2 --time=3 {ROOT}/slurm/pretrain.sbatch c.yaml a.b=1 train.steps=9\n"
    assert line in capsys.readouterr().out


def test_a_job_knows_its_options_or_what_slurm_says_of_it() -> None:
    assert slurm.submitted_with({slurm.OPTIONS: '["--nodes=2"]', "SLURM_JOB_PARTITION": "x"}) == ("--nodes=2",)
    assert slurm.submitted_with({"SLURM_JOB_PARTITION": "x"}) == ("--partition=x",)

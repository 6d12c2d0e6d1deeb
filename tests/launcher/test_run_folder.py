"""What the launcher reads in a run's folder, also in one that a real run has left."""

import json
from pathlib import Path

import pytest

from launcher import resume, run_folder, status
from launcher.job import Job, JobError
from pretrain import config as configs
from pretrain.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "pretrain" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_folder_is_the_one_that_the_run_takes(path: Path) -> None:
    words = ["run.dir='else where'", "run.seed=1"]
    assert run_folder.of(str(path), []) == str(configs.load(Recipe, path, []).run.folder)
    assert run_folder.of(str(path), words) == str(configs.load(Recipe, path, words).run.folder)


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("run: {name: a, dir: b}", "b/a"),
        ("run: {seed: 3, name: 'a b'}  # comment", "runs/a b"),
        ("data:\n  name: no\nrun:\n  # name: old\n  name: a  # new\n  seed: 1\ntrain: {name: no}", "runs/a"),
        ('run:\n  dir: "b"\n\n  name: a\n', "b/a"),
        ("run: {\n  name: a,\n  dir: b\n}\ntrain: {}", "b/a"),
    ],
)
def test_forms_of_the_run_section(tmp_path: Path, text: str, folder: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert run_folder.of("c.yaml", [], str(tmp_path)) == str(tmp_path / folder)


def test_a_run_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 1}")
    with pytest.raises(JobError, match=r"run\.name"):
        run_folder.of("c.yaml", [], str(tmp_path))
    assert run_folder.of("c.yaml", ["run.name=x"], str(tmp_path)) == str(tmp_path / "runs" / "x")


def made(run: Path, *, step: int = 8, steps: int = 20, saved: int = 5) -> Path:
    (run / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{saved:08d}" / "COMPLETE").touch()
    (run / "checkpoints" / "step-00000099").mkdir()  # interrupted in its save
    lines = [
        {"step": n, "loss": 1.5, "samples_per_s": 250.0, "step_time": 2.0, "time": 1000.0 + n}
        for n in range(1, step + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    (run / "log.txt").write_text(f"INFO step {step}/{steps}  loss 1.5  ETA 0:24\n")
    return run


def test_progress(tmp_path: Path) -> None:
    assert run_folder.progress(str(tmp_path / "none")) == (0, 0, -1, False)
    assert run_folder.progress(str(made(tmp_path / "run"))) == (8, 20, 5, False)
    assert run_folder.progress(str(made(tmp_path / "whole", step=20, saved=20))) == (20, 20, 20, True)
    with (tmp_path / "run" / "log.txt").open("a") as file:  # train.steps was lowered to what is done
        file.write("INFO resumed from x: 5 of 5 steps are done\n")
    assert run_folder.progress(str(tmp_path / "run")).steps == 5


def test_status(tmp_path: Path) -> None:
    run = str(made(tmp_path / "run"))
    text = status.describe(run, now=1010.0)
    assert "step 8/20 (40 %)" in text
    assert "loss 1.5000  250.0 samples/s  ETA 0:24  reported 0:02 ago" in text and "silent" not in text
    assert "last checkpoint: step 5" in text and "not started by this launcher" in text
    assert "silent" in status.describe(run, now=1100.0)
    run_folder.record(run, event="start", by_hand=True)
    run_folder.record(run, event="end", verdict="crashed", code=137, step=8, saved=5)
    run_folder.record(run, event="start", by_hand=False)
    assert "1 restarts, 1 after a failure; last end" in status.describe(run, now=1010.0)
    with pytest.raises(JobError, match="no such folder"):
        status.describe(str(tmp_path / "gone"), now=0.0)


def test_how_it_was_started_is_recalled(tmp_path: Path) -> None:
    job = Job("c.yaml", ("a.b=1",), kind="deepspeed", ranks_per_node=2, folder=str(tmp_path))
    resume.remember(str(tmp_path), job)
    assert resume.recall(str(tmp_path)) == job


def test_and_of_a_run_that_knows_no_launcher(tmp_path: Path) -> None:
    words = ["pretrain/main.py", "--local_rank=0", "--config", "c.yaml", "train.steps=4"]
    (tmp_path / "environment.json").write_text(json.dumps({"command": words, "world": 2}))
    found = resume.recall(str(tmp_path))
    assert (found.program, found.config, found.overrides) == ("pretrain", "c.yaml", ("train.steps=4",))
    assert (found.kind, found.ranks_per_node) == ("deepspeed", 2)


@pytest.mark.parametrize("text", ["", "[]", '{"config": "c", "colour": 1}', '{"config": "c", "nodes": 0}'])
def test_a_broken_note_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / resume.FILE).write_text(text)
    with pytest.raises(JobError):
        resume.recall(str(tmp_path))


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such folder"):
        resume.recall(str(tmp_path / "gone"))
    with pytest.raises(JobError, match="does not say how it was started"):
        resume.recall(str(tmp_path))

"""Sweeps, fine-tuning and shards as jobs of a real SLURM cluster: killed and queued again, they give what they give."""

import signal
from pathlib import Path

import pytest

from data_tools.__main__ import main as data_tools
from finetune import results
from pretrain.report import scores
from tests.cluster.machine import until
from tests.cluster.slurm import Cluster
from tests.cluster.work import Work, environment, send
from tests.data_tools.test_build import contents, folder_of_pairs
from tests.finetune.test_main import fine_tune, recipe_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_cluster")]


def trainers(cluster: Cluster, number: str) -> list[int]:
    """Return the processes that train for a job, wherever it runs."""
    return [pid for node in cluster.nodes for pid in cluster.ranks(node, number).values()]


def test_a_sweep_writes_one_table_whatever_happens_to_its_tasks(cluster, ranks, tmp_path) -> None:
    """Six tasks; a rank of one is killed, another is queued again."""
    files = [
        recipe_file(tmp_path, name="coop"),
        recipe_file(tmp_path, name="linear_probe", method="{name: linear_probe}"),
    ]
    number = cluster.submit(
        "--array=0-5%3", f"--output={tmp_path}/%a.out", "slurm/sweep.sbatch", tmp_path / "sweep",
        ",".join(map(str, files)), "2", "1,2,3", f"base={tmp_path}/export", env=environment(),
    )  # fmt: skip
    for task, act in ((1, None), (2, "requeue")):  # at once: on a busy machine a run here takes longer than one there
        disturb(cluster, f"{number}_{task}", act)
    wanted = []
    for file in files:
        for seed in (1, 2, 3):
            words = (f"run.dir={tmp_path}/here", f"run.name={file.stem}-shots2-seed{seed}", "task.shots=2")
            ranks.run(1, fine_tune, str(file), *words, f"task.seed={seed}", f"run.seed={seed}")
            wanted.append(tmp_path / "here" / words[1].partition("=")[2])
    for task in range(6):
        found = cluster.ended(f"{number}_{task}", 240, lambda task=task: (tmp_path / f"{task}.out").read_text())
        assert found["JobState"] == "COMPLETED", (tmp_path / f"{task}.out").read_text()
    assert cluster.job(f"{number}_2")["Restarts"] == "1"
    assert "crashed" in (tmp_path / "1.out").read_text()
    assert (tmp_path / "sweep" / "results.txt").read_text() == scores.table(wanted) + "\n"
    assert not list((tmp_path / "sweep").glob(".*part"))
    assert {cell.label for cell in results.read(tmp_path / "sweep")} == {"coop", "linear_probe"}
    assert "# 6 runs" in (tmp_path / "sweep" / "results.md").read_text()
    assert (tmp_path / "sweep" / "results.html").is_file()


def disturb(cluster: Cluster, task: str, act: str | None) -> None:
    """Kill the rank of a task as soon as it is there, or have SLURM queue the task again."""
    until(lambda: trainers(cluster, cluster.job(task)["JobId"]), 90, f"task {task} does not train")
    if act is None:
        send(trainers(cluster, cluster.job(task)["JobId"]), signal.SIGKILL)
    else:
        cluster.login.run("scontrol", act, task)


def test_a_sweep_that_would_lack_combinations_is_refused(cluster, tmp_path) -> None:
    number = cluster.submit(
        "--array=6", f"--output={tmp_path}/%a.out", "slurm/sweep.sbatch", tmp_path, "a.yaml,b.yaml", "1", "1,2,3",
        "base=x", env=environment(),
    )  # fmt: skip
    assert cluster.ended(f"{number}_6")["ExitCode"] == "2:0"
    assert "6 combinations need sbatch --array=0-5; this task is 6" in (tmp_path / "6.out").read_text()


def test_fine_tuning_killed_once_ends_with_the_same_scores(cluster, ranks, tmp_path) -> None:
    file = recipe_file(tmp_path, name="tuned")
    words = ("train.steps=300", "checkpoint.every_steps=20")
    run = tmp_path / "runs" / "tuned"
    work = Work(cluster, run, "--nodes=1", "--ntasks-per-node=1", "slurm/finetune.sbatch", file, *words)
    work.at(45)
    send(work.ranks(work.nodes[0]), signal.SIGKILL)
    ranks.run(1, fine_tune, str(file), f"run.dir={tmp_path}/here", *words)
    work.ended("COMPLETED")
    assert "crashed (exit code 137)" in work.log() and work.resumed()[0] >= 40
    there, here = ((folder / "evals.jsonl").read_text() for folder in (run, tmp_path / "here" / "tuned"))
    assert there == here


def test_shards_built_by_killed_tasks_are_the_same_bytes(cluster, tmp_path) -> None:
    """Two sources; the build of one is killed, the task of the other is queued again."""
    sources = [folder_of_pairs(tmp_path / name, 2500) for name in ("one", "two")]
    options = ("--shard-size", "500")
    number = cluster.submit(
        "--array=0-1", f"--output={tmp_path}/%a.out", "slurm/build_shards.sbatch", tmp_path / "built", *sources,
        "--", *options, env=environment(),
    )  # fmt: skip
    until(lambda: list((tmp_path / "built" / "one").glob("*.tar")), 60, "no shard of the first")
    send(builders(cluster, "one"), signal.SIGKILL)
    until(lambda: list((tmp_path / "built" / "two").glob("*.tar")), 60, "no shard of the second")
    cluster.login.run("scontrol", "requeue", f"{number}_1")
    for source in sources:
        assert data_tools(["build", str(source), "--out", str(tmp_path / "here" / source.name), *options]) == 0
    for task, source in enumerate(sources):
        said = lambda task=task: (tmp_path / f"{task}.out").read_text()  # noqa: E731
        assert cluster.ended(f"{number}_{task}", 120, said)["JobState"] == "COMPLETED", said()
        assert contents(tmp_path / "built" / source.name) == contents(tmp_path / "here" / source.name)
    assert "ended with code 137, try 1 of 3" in (tmp_path / "0.out").read_text()
    assert cluster.job(f"{number}_1")["Restarts"] == "1"


def builders(cluster: Cluster, name: str) -> list[int]:
    """Return the processes that build a source."""
    found = []
    for node in cluster.nodes.values():
        for pid in node.processes():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"data_tools" in words and f"/built/{name}" in b" ".join(words).decode() and b"-m" in words[:3]:
                found.append(pid)
    return found

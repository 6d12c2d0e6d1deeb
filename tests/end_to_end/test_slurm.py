"""Pretraining on a real SLURM cluster: two nodes train as one machine does, and every failure of the table ends well.

The table of slurm/README.md; each of its lines is an act here. Losses are compared over all steps: a step that was
lost, done twice or done otherwise would show.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.machine import until
from tests.cluster.slurm import Cluster
from tests.cluster.work import Work, send
from tests.end_to_end.jobs import FEW_STEPS, losses, losses_of, pretrain
from tests.end_to_end.test_pretrain import close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_cluster")]

STEPS, EVERY = 150, 5
SETTINGS = (f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "evals={}", "data.workers=0")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.config_file(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def uninterrupted(ranks, config: Path) -> dict[int, float]:
    """Losses of two ranks that nothing happens to."""
    return losses_of(ranks, 2, config, "uninterrupted", *SETTINGS)


def submitted(cluster: Cluster, config: Path, name: str, *options: str) -> Work:
    run = config.parent / "runs" / name
    return Work(cluster, run, *options, "slurm/pretrain.sbatch", config, f"run.name={name}", *SETTINGS)


def test_two_nodes_train_as_one_machine_does(cluster, ranks, demo_config, tmp_path) -> None:
    """Show: 2 nodes x 2 ranks over the network to the losses of 4 ranks on one machine."""
    words = (f"run.dir={tmp_path}", *FEW_STEPS)
    work = Work(
        cluster, tmp_path / "nodes", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2",
        "slurm/pretrain.sbatch", demo_config, "run.name=nodes", *words,
    )  # fmt: skip
    ranks.run(4, pretrain, demo_config, "run.name=machine", *words)
    work.ended("COMPLETED")
    close(losses(tmp_path / "nodes"), losses(tmp_path / "machine"), 1e-4)


def test_a_killed_rank_is_started_again_on_the_same_nodes(cluster, config, uninterrupted) -> None:
    work = submitted(cluster, config, "killed", *TWO_NODES)
    saved = work.at(12)
    send(work.ranks(work.nodes[1]), signal.SIGKILL)
    work.said(r"crashed \(exit code 137\)")
    work.ended("COMPLETED")
    assert cluster.job(work.number)["Restarts"] == "0"
    assert len(work.resumed()) == 1 and work.resumed()[0] >= saved
    assert losses(work.run) == uninterrupted


def test_whoever_stops_the_ranks_they_go_on(cluster, config, uninterrupted) -> None:
    """`scontrol requeue`, preemption, and a slurmctld that is dead when the job wants to be queued again."""
    work = submitted(cluster, config, "stopped", "--nodes=1", "--ntasks-per-node=1")
    floor = [work.at(12)]
    cluster.login.run("scontrol", "requeue", str(work.number))
    work.restarted(1)
    floor += [work.at(30)]
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true", env=dict(os.environ)
    )
    assert cluster.ended(urgent)["JobState"] == "COMPLETED"
    work.restarted(2)
    work.said("(?s)(resumed from.*){2}")  # a fast machine had come beyond step 50 before it was preempted
    floor += [work.at(max(50, work.step() + 1))]
    first = work.nodes[0]
    cluster.kill_controller()
    send([work.supervisor(first)], signal.SIGUSR1)
    work.said("trying for 10 minutes")
    assert not work.ranks(first)
    cluster.start_controller()
    # slurmstepd looks for a controller that was away once a minute; a killed one may have forgotten the last restart
    until(lambda: cluster.hasten(work.number) or len(work.resumed()) == 3, 150, work.log)
    work.ended("COMPLETED")
    assert len(work.resumed()) == 3
    assert all(went_on >= saved for went_on, saved in zip(work.resumed(), floor)), (work.resumed(), floor)
    close(losses(work.run), uninterrupted, 1e-4)


def test_whatever_happens_to_its_nodes_the_job_goes_on(cluster, config, uninterrupted) -> None:
    """A killed slurmd, a power cut of a node and of the batch script's, and a cable pulled out and put back."""
    work = submitted(cluster, config, "nodes", *TWO_NODES)
    work.at(6)
    second = work.nodes[1]
    cluster.kill_slurmd(second)
    floor = [work.at(15)]
    cluster.start_slurmd(second)
    assert cluster.job(work.number)["Restarts"] == "0"
    for times, (step, which) in enumerate(((20, 1), (40, 0)), 1):
        floor[times - 1 :] = [work.at(step)]
        lost = work.nodes[which]
        cluster.nodes[lost].power_cut()
        work.restarted(times)
        assert lost not in work.nodes
        cluster.power_on(lost)
    floor += [work.at(60)]
    lost = work.nodes[0]
    stale = work.ranks(lost)
    cluster.nodes[lost].unplug()
    work.restarted(3)
    work.said("(?s)(resumed from.*){3}")
    cluster.nodes[lost].plug()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stale), 60, "ranks on the node that came back")
    work.ended("COMPLETED")
    assert all(went_on >= saved for went_on, saved in zip(work.resumed(), floor)), (work.resumed(), floor)
    assert losses(work.run) == uninterrupted


def test_a_node_that_was_away_writes_nothing_when_it_comes_back(cluster, config, uninterrupted) -> None:
    """The time limit; then a node that is cut off and stands still wakes up when its job runs elsewhere."""
    one_rank = ("--nodes=1", "--ntasks-per-node=1", "--time=30", "--signal=B:USR1@60")
    work = submitted(cluster, config, "fenced", *one_rank)
    saved = work.at(7)
    frozen = work.ranks(work.nodes[0])
    send(frozen, signal.SIGSTOP)  # or a fast machine would be done before the limit
    limit(cluster, work, minutes_of(cluster, work) + 1)
    work.said("USR1: passed on")
    send(frozen, signal.SIGCONT)
    until(lambda: cluster.state(work.number) == "PENDING", 60, work.log)
    limit(cluster, work, 30)  # or it would come to the next start while that is being imported
    work.restarted(1)
    assert work.at(work.step() + 5) >= saved
    away = work.nodes[0]
    stale = [*work.ranks(away), work.supervisor(away)]
    send(stale, signal.SIGSTOP)
    cluster.nodes[away].unplug()
    work.restarted(2)
    work.said("(?s)(resumed from.*){2}")
    send(stale[:-1], signal.SIGCONT)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stale[:-1]), 60, "the old ranks go on")
    work.said("a newer start of this run has taken over")
    send(stale[-1:], signal.SIGCONT)
    work.said("another start of this run has taken over")
    cluster.nodes[away].plug()
    work.ended("COMPLETED")
    close(losses(work.run), uninterrupted, 1e-4)


def minutes_of(cluster: Cluster, work: Work) -> int:
    """Return for how many minutes a job has run, and 15 s."""
    hours, minutes, seconds = cluster.job(work.number)["RunTime"].split(":")
    return 60 * int(hours) + (60 * int(minutes) + int(seconds) + 15) // 60


def limit(cluster: Cluster, work: Work, minutes: int) -> None:
    """Change a job's time limit."""
    cluster.login.run("scontrol", "update", f"JobId={work.number}", f"TimeLimit={minutes}")


def test_a_cancelled_job_stays_so(cluster, config) -> None:
    work = submitted(cluster, config, "cancelled", "--nodes=1", "--ntasks-per-node=1")
    work.at(6)
    node = work.nodes[0]
    cluster.cancel(str(work.number))
    work.ended("CANCELLED")
    until(lambda: not cluster.ranks(node, work.number), 30, "its ranks go on")
    cluster.all_idle()
    found = cluster.job(work.number)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")


def test_a_mistake_ends_the_job_with_its_sentence(cluster, config, tmp_path) -> None:
    """Also where the ranks' Python is in a container: here a script that says so."""
    inside = tmp_path / "in_container"
    inside.write_text(f'#!/bin/sh\necho inside; exec {sys.executable} "$@"\n')
    inside.chmod(0o755)
    words = ("--nodes=2", "--ntasks-per-node=1", "slurm/pretrain.sbatch", config, "run.name=mistake", "optim.rate=1")
    run = config.parent / "runs" / "mistake"
    work = Work(cluster, run, *words, PYTHON=str(inside), HOST_PYTHON=sys.executable)
    work.ended("FAILED")
    assert "unknown key 'optim.rate'" in work.log()
    assert work.log().count("inside") == 2  # ranks
    assert cluster.job(work.number)["ExitCode"] == "2:0"

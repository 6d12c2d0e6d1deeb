"""SLURM's commands: the sbatch line of a job, what squeue and scontrol say, back to the queue."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Mapping, NamedTuple

from launcher import world
from launcher.job import ROOT, Job, JobError

SECONDS = 60  #: a controller that is dead or overloaded answers late or never
OPTIONS = "DIPTYCH_SBATCH"  #: the variable by which a job learns its options
FORMAT = "%i|%j|%T|%M|%L|%D|%R"


class SlurmError(RuntimeError):
    """SLURM refused, or is not there; the message is its own (exit code 1)."""


@dataclass(frozen=True)
class Wishes:
    """What sbatch is asked for beyond the job itself; empty: the site's default."""

    name: str = ""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    mem: str = ""
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    signal_seconds: int = 0  #: before the time limit; 0: what the script says
    output: str = ""
    extra: tuple[str, ...] = ()  #: more options, as sbatch wants them


class Queued(NamedTuple):
    """A line of squeue."""

    job: str
    name: str
    state: str
    run_time: str
    time_left: str
    nodes: str
    where: str  #: the nodes, or in brackets why it waits


def script(job: Job) -> str:
    """Return the batch script of a job's program.

    Raises:
        JobError: it is not there.
    """
    path = os.path.join(ROOT, "slurm", f"{job.program}.sbatch")
    if not os.path.isfile(path):
        raise JobError(f"{path}: no such batch script; the installation is not complete")
    return path


def options(job: Job, wishes: Wishes) -> tuple[str, ...]:
    """Return the options by which a job is submitted: one task a rank, as the batch script wants it."""
    words = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    named = {
        "job-name": wishes.name,
        "time": wishes.time,
        "partition": wishes.partition,
        "account": wishes.account,
        "qos": wishes.qos,
        "constraint": wishes.constraint,
        "mem": wishes.mem,
        "gpus-per-node": wishes.gpus_per_node,
        "cpus-per-task": wishes.cpus_per_task,
        "signal": f"B:USR1@{wishes.signal_seconds}" if wishes.signal_seconds else "",
        "output": wishes.output,
    }
    words += [f"--{name}={value}" for name, value in named.items() if value]
    return (*words, *wishes.extra)


def sbatch_line(job: Job) -> list[str]:
    """Return the command that submits a job with its options."""
    return ["sbatch", *job.sbatch, script(job), job.config, *job.overrides]


def ask(words: list[str], *, seconds: float = SECONDS, env: Mapping[str, str] | None = None) -> str:
    """Return what a command of SLURM prints.

    Raises:
        SlurmError: it is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=env)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not on this machine; run this where SLURM's commands are") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} has not answered for {seconds:.0f} s; the controller may be down") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{words[0]}: {said.splitlines()[-1]}")
    return done.stdout


def submit(job: Job) -> str:
    """Submit a job from its folder and return its number.

    The job is told its own options, so that its run can note how it was submitted.

    Raises:
        SlurmError: sbatch refuses.
    """
    env = {**world.outside(os.environ), OPTIONS: json.dumps(job.sbatch)}
    said = ask(["sbatch", "--parsable", f"--chdir={job.folder}", *sbatch_line(job)[1:]], env=env)
    return said.strip().partition(";")[0]


def submitted_with(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the options that `submit` has told this job; without it, what SLURM says of its size."""
    if env.get(OPTIONS):
        return tuple(json.loads(env[OPTIONS]))
    kept = {"--partition": "SLURM_JOB_PARTITION", "--account": "SLURM_JOB_ACCOUNT", "--qos": "SLURM_JOB_QOS"}
    return tuple(f"{option}={env[name]}" for option, name in kept.items() if env.get(name))


def parse_queue(text: str) -> list[Queued]:
    """Return the lines that `squeue --noheader --format=FORMAT` printed."""
    rows = [line.strip().split("|", 6) for line in text.splitlines()]
    return [Queued(*row) for row in rows if len(row) == 7]


def queue(*, job: str = "", user: str = "") -> list[Queued]:
    """Return the queue: one job, or all of a user.

    Raises:
        SlurmError: squeue does not answer. A job that has left the queue is no error: it is not in the list.
    """
    which = [f"--jobs={job}"] if job else [f"--user={user}"]
    try:
        return parse_queue(ask(["squeue", "--noheader", f"--format={FORMAT}", *which]))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise


def record(job: str) -> dict[str, str]:
    """Return what SLURM keeps of a job, as `scontrol show job` names it; {} of one that it has forgotten.

    Raises:
        SlurmError: scontrol does not answer.
    """
    try:
        said = ask(["scontrol", "show", "job", "--oneliner", job])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def requeue(job: str) -> None:
    """Put a running job back into the queue; it ends now and starts again with SLURM_RESTART_COUNT one higher.

    Raises:
        SlurmError: SLURM refuses, as for a job submitted with --no-requeue.
    """
    ask(["scontrol", "requeue", job])


def silent_nodes(nodes: int, *, seconds: float = SECONDS) -> str:
    """Start nothing on each node of this job; return "" where all answer, else what SLURM says.

    A node that has lost its power is told from a process that has crashed long before SLURM calls it DOWN.
    """
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "true"]
    try:
        ask(words, seconds=seconds)
    except SlurmError as error:
        return str(error)
    return ""

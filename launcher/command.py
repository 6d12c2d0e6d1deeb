"""From a job to the words that start its ranks: python, deepspeed, torchrun or srun."""

from __future__ import annotations

import os
from typing import Mapping

from launcher.job import Job


def program(job: Job) -> list[str]:
    """Return the program and its words, as each rank gets them."""
    return [job.script, "--config", job.config, *job.overrides]


def build(job: Job, *, port: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command of a job; `port` is where its ranks meet. `env` is asked for the CPUs of a SLURM task."""
    if job.kind == "srun":
        return _srun(job, env)
    if job.kind == "deepspeed":
        return _deepspeed(job, port)
    if job.kind == "torchrun":
        return _torchrun(job, port)
    return [job.python, *program(job)]


def _deepspeed(job: Job, port: int) -> list[str]:
    words = [job.python, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    if job.nodes == 1:
        # without a number it takes the NUMA nodes of a CPU machine; a hostfile at its default place would be read
        words += ["--num_gpus", str(job.ranks_per_node), "--hostfile", "/dev/null"]
        return [*words, *program(job)]
    words += ["--hostfile", job.hostfile]
    if job.master_addr:
        words += ["--master_addr", job.master_addr]
    if job.node_rank >= 0:
        words += ["--no_ssh", "--node_rank", str(job.node_rank)]
    return [*words, *program(job)]


def _torchrun(job: Job, port: int) -> list[str]:
    words = [job.python, "-m", "torch.distributed.run", "--nproc-per-node", str(job.ranks_per_node)]
    # restarting is the supervisor's work, which knows what the run has saved
    words += ["--max-restarts", "0", "--nnodes", str(job.nodes)]
    if job.nodes == 1:
        words += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    else:
        words += ["--node-rank", str(job.node_rank), "--master-addr", job.master_addr, "--master-port", str(port)]
    return [*words, *program(job)]


def _srun(job: Job, env: Mapping[str, str]) -> list[str]:
    """One task a rank: SLURM starts and watches every rank itself, nothing goes over ssh."""
    words = [
        "srun",
        f"--nodes={job.nodes}",
        f"--ntasks={job.world}",
        f"--ntasks-per-node={job.ranks_per_node}",
        "--unbuffered",  # whole lines of the log as they come
        # Ranks leave one after the other with code 85: the first must not have the others killed in their save (a site
        # may set KillOnBadExit=1). But when one has died, the others wait for it for ever: end them after a minute.
        "--kill-on-bad-exit=0",
        "--wait=60",
    ]
    if env.get("SLURM_CPUS_PER_TASK"):
        # since 22.05 srun does not take it over from sbatch, and each rank would be bound to one core
        words.append(f"--cpus-per-task={env['SLURM_CPUS_PER_TASK']}")
    return [*words, job.python, *program(job)]

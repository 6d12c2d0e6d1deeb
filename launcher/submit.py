"""`submit`: put a job into SLURM's queue, by the batch script of its program."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex

from launcher import slurm
from launcher.job import Job
from launcher.run import add_job_arguments

HELP = "Submit a run to SLURM; --dry-run prints the sbatch line."
EXAMPLE = """example:
  python -m launcher submit --nodes 2 --gpus-per-node 8 --cpus-per-task 12 --time 12:00:00 CONFIG train.steps=20000
what else sbatch knows: --sbatch=--exclusive --sbatch=--mail-type=END"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of `submit`."""
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch line, submit nothing")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, help="one task a rank (default: the GPUs of a node, else 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--cpus-per-task", type=int, default=0, help="for a rank and its data.workers")
    parser.add_argument("--signal-seconds", type=int, default=0, help="save so long before the time limit (120)")
    for name in ("name", "time", "partition", "account", "qos", "constraint", "mem", "output"):
        parser.add_argument(f"--{name}", default="", help=f"as sbatch's --{'job-name' if name == 'name' else name}")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch")
    add_job_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    each = args.ranks_per_node or args.gpus_per_node or 1
    job = Job(args.config, tuple(args.override), args.program, "srun", args.nodes, each, folder=os.getcwd())
    job.check_files()
    wishes = slurm.Wishes(
        name=args.name,
        time=args.time,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        mem=args.mem,
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        signal_seconds=args.signal_seconds,
        output=args.output,
        extra=tuple(args.sbatch),
    )
    job = dataclasses.replace(job, sbatch=slurm.options(job, wishes))
    return submit(job, dry_run=args.dry_run)


def submit(job: Job, *, dry_run: bool) -> int:
    """Print the line of a job and submit it; return the exit code."""
    print(shlex.join(slurm.sbatch_line(job)), flush=True)
    if not dry_run:
        print(f"job {slurm.submit(job)}")
    return 0

"""`resume`: how a run was started, from RUN/launch.json or what the run itself has noted, and start it again so."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from launcher import job as jobs
from launcher import run_folder
from launcher.job import Job, JobError
from launcher.verdict import Policy

FILE = "launch.json"
HELP = "Start the run of a folder again as it was started (or submitted); it goes on from its last checkpoint."
EXAMPLE = """example:
  python -m launcher resume runs/clip_iconcaps train.steps=4000"""


def remember(run: str, job: Job) -> None:
    """Write what was started, for `resume`."""
    path = os.path.join(run, FILE)
    tree = {**job.tree(), "folder": os.path.abspath(job.folder)}
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(tree, file, indent=1)
    os.replace(path + ".new", path)


def recall(run: str) -> Job:
    """Return the job of a run: as the launcher wrote it, or as the run's environment.json tells.

    Raises:
        JobError: no run, or one that does not say how it was started.
    """
    if not os.path.isdir(run):
        raise JobError(f"{run}: no such folder; give the folder of a run, such as runs/clip_iconcaps")
    try:
        with open(os.path.join(run, FILE), encoding="utf-8") as file:
            return jobs.from_tree(json.load(file))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        raise JobError(f"{os.path.join(run, FILE)}: cannot be read ({error}); start the run by its config") from error
    return _from_environment(run)


def _from_environment(run: str) -> Job:
    """Return the job of a run that was started without this launcher, on this machine."""
    path = os.path.join(run, "environment.json")
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
        words = [word for word in tree["command"] if not word.startswith("--local_rank")]
        config = words[words.index("--config") + 1]
        script, world = words[0], int(tree["world"])
        where = tree.get("slurm_job")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise JobError(f"{run}: does not say how it was started ({error!r}); start it by its config") from error
    if where:
        raise JobError(f"{run}: it ran in SLURM job {where}; start it with the same `submit` or sbatch line")
    program = os.path.basename(os.path.dirname(os.path.abspath(script)))
    overrides = tuple(word for word in words[1:] if "=" in word and not word.startswith("-"))
    return Job(config, overrides, program, "deepspeed" if world > 1 else "python", 1, world)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of `resume`."""
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("override", nargs="*", metavar="section.key=value", help="further changes to the config")
    parser.add_argument("--dry-run", action="store_true", help="print environment and command, start nothing")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from launcher import run as starter  # which writes what this file reads
    from launcher import submit

    job = recall(args.run_folder)
    job = dataclasses.replace(job, overrides=(*job.overrides, *args.override))
    there = run_folder.of(job.config, job.overrides, job.folder)
    if os.path.realpath(there) != os.path.realpath(args.run_folder):
        raise JobError(f"{args.run_folder}: was moved; its command leads to {there}. Add run.dir=... run.name=...")
    path, step = run_folder.newest_checkpoint(args.run_folder)
    print(f"launcher: goes on from {path} (step {step})" if path else "launcher: no checkpoint yet, starts anew")
    if job.kind == "srun" and starter.place().kind != "slurm":
        job.check_files()
        return submit.submit(job, dry_run=args.dry_run)
    return starter.launch(job, Policy(), dry_run=args.dry_run)

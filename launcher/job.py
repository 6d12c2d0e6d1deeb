"""A job: what to run, on how much, where; refused in one sentence where its parts do not fit together."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  #: of the clone, or of the installed packages
PROGRAMS = ("pretrain", "finetune")
KINDS = ("python", "deepspeed", "torchrun", "srun")


class JobError(ValueError):
    """A request that cannot be carried out; the message says what, where and what to do (exit code 2)."""


@dataclass(frozen=True)
class Job:
    """One run of a program. Paths in the config and the overrides are relative to `folder`."""

    config: str
    overrides: tuple[str, ...] = ()
    program: str = "pretrain"  #: whose main.py
    kind: str = "python"  #: what starts the ranks
    nodes: int = 1
    ranks_per_node: int = 1
    python: str = sys.executable
    folder: str = "."  #: where the command runs
    hostfile: str = ""  #: DeepSpeed's list of machines, for several nodes without SLURM
    node_rank: int = -1  #: which of the nodes this is, where each node starts its own part (no ssh); -1: not so
    master_addr: str = ""  #: the first node, as the others reach it
    master_port: int = 0  #: 0: chosen from the SLURM job, or a free one
    sbatch: tuple[str, ...] = ()  #: the options that it was submitted with, so that it can be submitted again

    def __post_init__(self) -> None:
        """Raise JobError where the parts do not fit together."""
        if self.program not in PROGRAMS:
            raise JobError(f"program {self.program!r}: choose {' or '.join(PROGRAMS)}")
        if self.kind not in KINDS:
            raise JobError(f"--with {self.kind}: choose one of {', '.join(KINDS)}")
        if not self.config:
            raise JobError("no config: give a YAML file, such as pretrain/configs/clip_iconcaps.yaml")
        for word in self.overrides:
            if "=" not in word or word.startswith(("-", "=")):
                raise JobError(f"override {word!r}: write it as section.key=value, e.g. train.steps=100")
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise JobError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number from 1")
        if not 0 <= self.master_port < 65536:
            raise JobError(f"--master-port {self.master_port}: give a number from 1 to 65535")
        self._check_nodes()

    def _check_nodes(self) -> None:
        if self.kind == "python" and self.world > 1:
            raise JobError(f"--with python starts one rank, not {self.world}: use deepspeed, torchrun or srun")
        if self.node_rank >= self.nodes:
            raise JobError(f"--node-rank {self.node_rank}: with --nodes {self.nodes} it is 0 to {self.nodes - 1}")
        if self.nodes == 1 or self.kind == "srun":
            return
        if self.node_rank >= 0 and not (self.master_addr and self.master_port):
            raise JobError("--node-rank also needs --master-addr and --master-port, the same on all nodes")
        if self.kind == "torchrun" and self.node_rank < 0:
            raise JobError(
                "torchrun on several nodes: start it on each, with its --node-rank; or use srun or deepspeed"
            )
        if self.kind == "deepspeed" and not self.hostfile:
            raise JobError("deepspeed on several nodes: give --hostfile (ssh; with --node-rank on each node: no ssh)")

    @property
    def world(self) -> int:
        """Return the number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def script(self) -> str:
        """Return the path of the program that every rank runs."""
        return os.path.join(ROOT, self.program, "main.py")

    def check_files(self) -> None:
        """Refuse what is not there before anything is started.

        Raises:
            JobError: config, hostfile or folder is missing.
        """
        if not os.path.isdir(self.folder):
            raise JobError(f"{self.folder}: no such folder; the run was started in one that is gone")
        for name in ("config", "hostfile"):
            path = getattr(self, name)
            if path and not os.path.isfile(os.path.join(self.folder, path)):
                raise JobError(f"{name} {path}: no such file in {os.path.abspath(self.folder)}")

    def tree(self) -> dict[str, Any]:
        """Return the job as JSON can hold it."""
        return dataclasses.asdict(self)


def from_tree(tree: dict[str, Any]) -> Job:
    """Return the job that `Job.tree` wrote; keys of a newer version are an error.

    Raises:
        JobError: no job.
    """
    known = {field.name for field in dataclasses.fields(Job)}
    unknown = sorted(set(tree) - known)
    if unknown or "config" not in tree:
        raise JobError(f"not a job: {('unknown ' + unknown[0]) if unknown else 'no config'}")
    return Job(**{**tree, **{name: tuple(tree.get(name, ())) for name in ("overrides", "sbatch")}})

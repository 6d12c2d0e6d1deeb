"""`doctor`: check the nodes of a run before it starts, and say what is wrong with which of them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import uuid
from typing import Any

from launcher import findings, hostfile, machine, world
from launcher.findings import Finding
from launcher.job import JobError
from launcher.node import MARK
from launcher.reach import SSH, Nodes, Said
from launcher.run import place

HELP = "Check nodes before a run: GPUs, ports, interface, clocks, disk, shared folder, versions, an all-reduce."
EXAMPLE = """examples:
  python -m launcher doctor                                         this machine
  python -m launcher doctor --nodes 2 --sbatch=--gpus-per-node=8    two nodes of SLURM, allocated for it
  srun is used inside of a job (salloc, sbatch), ssh with --hostfile hosts
exit code 0: nothing is wrong (doubts may be shown); 1: something is"""
PROBE_MARK = "@diptych-probe "  #: pretrain/engine/probe.py
FACTS, REDUCE, GRACE = 120.0, 180.0, 15.0  #: seconds; torch may lie on a disk that is cold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of `doctor`."""
    parser.add_argument("--hostfile", default="", help="machines to reach by ssh: `node1 slots=8` a line")
    parser.add_argument("--nodes", type=int, default=0, help="outside of a job: ask SLURM for so many nodes")
    parser.add_argument("--ranks-per-node", type=int, default=0, help="of the all-reduce (default: the GPUs, else 1)")
    parser.add_argument("--folder", default="runs", help="where runs will be written, and all nodes must see it")
    parser.add_argument("--need-gib", type=float, default=10.0, help="free space wanted there")
    parser.add_argument("--port", type=int, default=0, help="where ranks will meet (default: as a run would choose)")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long nodes wait for each other")
    parser.add_argument("--mib", type=float, default=16.0, help="size of the all-reduce")
    parser.add_argument("--no-all-reduce", action="store_true", help="leave it out: half a minute, and wants torch")
    parser.add_argument("--python", default=sys.executable, help="the Python that has diptych's dependencies")
    parser.add_argument("--ssh", default=SSH, help="the command that takes a host and a line for its shell")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="options of the allocation")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    here = place()
    if args.nodes and here.kind != "slurm" and not args.hostfile:
        _allocate(args)
    nodes = _nodes(args, here)
    port = args.port or (here.master_port if here.kind == "slurm" else world.free_port())
    print(f"{len(nodes.hosts)} node(s) by {nodes.how}: {', '.join(nodes.hosts)}", flush=True)
    examination = Examination(nodes, args, port)
    found = examination.all()
    fatal = [finding for finding in found if finding.fatal]
    print(f"{len(fatal)} wrong, {len(found) - len(fatal)} in doubt" if found else "nothing is wrong")
    return 1 if fatal else 0


def _allocate(args: argparse.Namespace) -> None:
    """Become salloc, which runs this command again inside of an allocation: all checks must see the same nodes."""
    if not shutil.which("salloc"):
        raise JobError("--nodes: SLURM's salloc is not on this machine; name the machines with --hostfile")
    given = sys.argv[1:] if sys.argv[1:2] == ["doctor"] else ["doctor"]
    words = ["salloc", f"--nodes={args.nodes}", f"--ntasks-per-node={max(1, args.ranks_per_node)}", *args.sbatch]
    sys.stdout.flush()
    os.execvp("salloc", [*words, sys.executable, "-m", "launcher", *given])  # noqa: S606, S607 (no shell; SLURM's own)


def _nodes(args: argparse.Namespace, here: world.World) -> Nodes:
    if args.hostfile:
        return Nodes(tuple(host for host, _ in hostfile.read(args.hostfile)), "ssh", args.ssh)
    if here.kind == "slurm":
        return Nodes(here.hosts, "srun")
    return Nodes(("localhost",), "local")


class Examination:
    """The checks, in the order in which one makes the next meaningful."""

    def __init__(self, nodes: Nodes, args: argparse.Namespace, port: int) -> None:
        self.nodes = nodes
        self.args = args
        self.port = port
        self.found: list[Finding] = []

    def all(self) -> list[Finding]:
        """Run every check, print as it goes, and return what is wrong."""
        facts = self._facts()
        if len(facts) == len(self.nodes.hosts):
            self._meeting()
        ports = any(finding.kind == "port" and finding.fatal for finding in self.found)
        if self.args.no_all_reduce:
            pass
        elif len(facts) < len(self.nodes.hosts) or ports:
            print("all-reduce: not tried, the nodes do not reach each other", flush=True)
        else:
            self._all_reduce(facts)
        return self.found

    def _report(self, found: list[Finding]) -> None:
        self.found += found
        for finding in found:
            print(finding.line(), flush=True)

    def _ask(self, what: str, *words: str) -> dict[str, dict[str, Any]]:
        """Return what each node says, by name in the order of the nodes; those that say nothing are reported."""
        count = len(self.nodes.hosts)
        line = [
            self.args.python,
            "-m",
            "launcher.node",
            what,
            "--folder",
            self.args.folder,
            "--count",
            str(count),
            *words,
        ]
        by_srun = self.nodes.how == "srun"
        each = [line if by_srun else [*line, "--index", str(at)] for at in range(count)]
        said = self.nodes.each(each, seconds=FACTS)
        trees = answers(said, MARK)
        names = {at: self.nodes.hosts[at] if at < count else tree["host"] for at, tree in trees.items()}
        missing = [host for at, host in enumerate(self.nodes.hosts) if at not in trees]
        if missing:
            self._report([findings.wrong("node", silence(host, said)) for host in missing])
        return {names[at]: trees[at] for at in sorted(trees)}

    def _facts(self) -> dict[str, dict[str, Any]]:
        facts = self._ask("facts")
        for name, tree in facts.items():
            gpus = tree["gpus"]["list"]
            shown = f"{len(gpus)} x {gpus[0][0]}" if gpus else "no GPU"
            free = tree["free"] / findings.GIB
            print(f"{name}: {tree['cores']} cores, {shown}, torch {tree['versions']['torch']}, {free:.0f} GiB free")
        ranks = self.args.ranks_per_node or 1
        need, folder = self.args.need_gib, self.args.folder
        self._report(findings.of_facts(facts, ranks=ranks, need_gib=need, folder=folder))
        return facts

    def _meeting(self) -> None:
        words = (
            "--head",
            self._head(),
            "--port",
            str(self.port),
            "--token",
            uuid.uuid4().hex,
            "--seconds",
            str(self.args.seconds),
        )
        nodes = self._ask("meet", *words)
        if len(nodes) < len(self.nodes.hosts):
            return
        found = findings.of_meeting(nodes, port=self.port, folder=self.args.folder)
        self._report(found)
        others = list(nodes.values())[1:]
        if others and not any(finding.fatal for finding in found):
            worst = max(abs(tree["offset"]) for tree in others)
            print(f"network: ports open, clocks within {1000 * worst:.0f} ms, {self.args.folder} is shared")

    def _head(self) -> str:
        return "127.0.0.1" if self.nodes.how == "local" else self.nodes.hosts[0]

    def _all_reduce(self, facts: dict[str, dict[str, Any]]) -> None:
        each = self.args.ranks_per_node or max(1, min(tree["gpus_here"] for tree in facts.values()))
        words = [self.args.python, "-m", "pretrain.engine.probe", "--mib", str(self.args.mib)]
        meet = {"MASTER_ADDR": self._head(), "MASTER_PORT": str(self.port)}
        if self.nodes.how == "srun":
            cards = [self._interface(tree) for tree in facts.values()]
            same = cards[0] if all(card == cards[0] for card in cards) else {}
            said = self.nodes.srun_ranks(each, words, seconds=REDUCE, env={**meet, **same})
        else:
            hosts = tuple(host for host in self.nodes.hosts for _ in range(each))
            envs = [
                {**meet, **self._interface(facts[host]), **_rank(rank, each, len(hosts))}
                for rank, host in enumerate(hosts)
            ]
            all_ranks = self.nodes._replace(hosts=hosts)
            said = all_ranks.each([words] * len(hosts), seconds=REDUCE, env=envs, grace=GRACE)
        lines = [line for one in said for line in one.out.splitlines() if PROBE_MARK in line]
        if not lines:
            reasons = sorted({silence(one.host or "a node", [one]) for one in said if one.code}, key=len)
            self._report([findings.wrong("reduce", f"the all-reduce failed: {reason}") for reason in reasons[:4]])
            return
        tree = json.loads(lines[0].partition(PROBE_MARK)[2])
        speed = f", {tree['gb_per_s']:.2f} GB/s a link" if tree["ranks"] > 1 else ""
        print(f"all-reduce: {tree['ranks']} ranks, {tree['mib']:g} MiB in {1000 * tree['seconds']:.1f} ms{speed}")

    def _interface(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the variable that `launcher run` would set on this node."""
        if len(self.nodes.hosts) == 1 or facts["variables"].get("GLOO_SOCKET_IFNAME"):
            return {}
        card = machine.needed_interface(facts["address"], facts["interfaces"])
        return {"GLOO_SOCKET_IFNAME": card} if card else {}


def _rank(rank: int, each: int, count: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % each, "LOCAL_WORLD_SIZE": each}
    return {name: str(value) for name, value in names.items()}


def answers(said: list[Said], mark: str) -> dict[int, dict[str, Any]]:
    """Return the JSON lines behind a mark, by the index of the node that printed them."""
    out: dict[int, dict[str, Any]] = {}
    for one in said:
        for line in one.out.splitlines():
            if mark in line:
                tree = json.loads(line.partition(mark)[2])
                out[int(tree["index"])] = tree
    return out


def silence(host: str, said: list[Said]) -> str:
    """Return why a node has said nothing: the last line of its errors, or of those that name it."""
    lines = [line for one in said if one.host in (host, "") for line in one.error.splitlines() if line.strip()]
    named = [line for line in lines if host in line] or [line for line in lines if line.startswith("error:")] or lines
    return f"{host} does not answer: {named[-1].strip() if named else 'nothing was said'}"

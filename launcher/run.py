"""`run`: start a job here, or on the nodes of this SLURM job, and see it through to its end."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import uuid

from launcher import again, command, environment, hostfile, machine, resume, run_folder, slurm, world
from launcher.job import KINDS, PROGRAMS, Job, JobError
from launcher.supervise import LAUNCH, Supervisor
from launcher.verdict import Policy
from launcher.world import World

HELP = "Start a run, pass signals on, start it again after a failure, stop where that has no sense."
EXAMPLE = """examples:
  python -m launcher run --ranks-per-node 2 pretrain/configs/clip_iconcaps.yaml train.steps=200
  python -m launcher run --program finetune finetune/configs/coop.yaml base=exports/mine
two machines by ssh, or without it (on each, with its own --node-rank):
  python -m launcher run --with deepspeed --hostfile hosts CONFIG
  python -m launcher run --with torchrun --nodes 2 --node-rank 0 --master-addr node1 --master-port 29500 CONFIG"""


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` and `submit` have in common."""
    parser.add_argument("--program", default="pretrain", choices=PROGRAMS, help="whose main.py to run")
    parser.add_argument("config", help="a YAML config")
    parser.add_argument("override", nargs="*", metavar="section.key=value", help="changes to the config")


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how often a run may fail."""
    usual = Policy()
    parser.add_argument(
        "--same-step", type=int, default=usual.same_step, metavar="N", help="stop after N failures at the same step"
    )
    parser.add_argument(
        "--no-progress",
        type=int,
        default=usual.no_progress,
        metavar="N",
        help="stop after N failures without a newer checkpoint",
    )
    parser.add_argument(
        "--first-wait",
        type=float,
        default=usual.first_wait,
        metavar="SECONDS",
        help="before the second start; doubled each time",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of `run`."""
    parser.add_argument(
        "--with", dest="kind", choices=KINDS, help="what starts the ranks (srun in a SLURM job, else by their number)"
    )
    parser.add_argument("--nodes", type=int, help="machines (SLURM's, the hostfile's, or 1)")
    parser.add_argument("--ranks-per-node", type=int, help="processes a machine (SLURM's tasks, else the GPUs, else 1)")
    parser.add_argument("--hostfile", default="", help="DeepSpeed's list of machines: `node1 slots=8` a line")
    parser.add_argument("--node-rank", type=int, help="start only this machine's part: 0 to nodes - 1 (no ssh)")
    parser.add_argument("--master-addr", default="", help="the first machine, as the others reach it")
    parser.add_argument("--master-port", type=int, default=0, help="a port that is free there")
    parser.add_argument("--python", default=sys.executable, help="the Python that has diptych's dependencies")
    parser.add_argument("--dry-run", action="store_true", help="print environment and command, start nothing")
    add_policy_arguments(parser)
    add_job_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    job = job_of(args, place())
    policy = Policy(args.same_step, args.no_progress, args.first_wait)
    return launch(job, policy, dry_run=args.dry_run)


def place() -> World:
    """Return where this process stands, the variables of a launcher that started this shell left out."""
    return world.read(world.outside(os.environ))


def job_of(args: argparse.Namespace, here: World) -> Job:
    """Return the job that the words ask for; what they leave open is SLURM's, the hostfile's or this machine's."""
    nodes, each = 1, machine.gpus() or 1
    node_rank, addr, port = -1, args.master_addr, args.master_port
    in_step = here.kind == "srun" and here.world > 1
    if args.hostfile:
        hosts = hostfile.read(args.hostfile)
        nodes, each = len(hosts), min(slots for _, slots in hosts)
    elif here.kind == "slurm":
        nodes, each = len(here.hosts), here.local_world
    elif in_step:
        if here.local_world != 1:
            raise JobError("in a step of srun, start this launcher once a node (--ntasks-per-node=1)")
        nodes = len(here.hosts)
    if in_step:
        node_rank, addr, port = here.rank, addr or here.master_addr, port or here.master_port
    nodes, each = args.nodes or nodes, args.ranks_per_node or each
    kind = args.kind or ("srun" if here.kind == "slurm" else "deepspeed" if nodes * each > 1 else "python")
    node_rank = args.node_rank if args.node_rank is not None else node_rank
    hosts_file = args.hostfile
    if in_step and kind == "deepspeed" and not hosts_file:
        hosts_file = _hostfile_of(here, each)
    return Job(
        args.config,
        tuple(args.override),
        args.program,
        kind,
        nodes,
        each,
        args.python,
        os.getcwd(),
        hosts_file,
        node_rank if nodes > 1 else -1,
        addr,
        port,
        sbatch=_sbatch(nodes, each) if here.kind == "slurm" else (),
    )


def _sbatch(nodes: int, each: int) -> tuple[str, ...]:
    """Return the options by which this job could be submitted again."""
    known = slurm.submitted_with(os.environ)
    size = (
        () if any(word.startswith("--nodes=") for word in known) else (f"--nodes={nodes}", f"--ntasks-per-node={each}")
    )
    return (*size, *known)


def _hostfile_of(here: World, each: int) -> str:
    """Write what DeepSpeed wants to read also where each node starts its own part."""
    handle, path = tempfile.mkstemp(prefix="hostfile-", dir=environment.folder())
    with os.fdopen(handle, "w") as file:
        file.write(hostfile.write([(host, each) for host in here.hosts]))
    return path


def launch(job: Job, policy: Policy, *, dry_run: bool = False) -> int:
    """Start a job and see it through; return the exit code.

    Raises:
        JobError: something that it needs is not there.
    """
    job.check_files()
    here = place()
    if job.kind == "srun" and here.kind != "slurm":
        raise JobError("--with srun: not in a SLURM job; use `python -m launcher submit`, or salloc first")
    os.chdir(job.folder)
    folder = run_folder.of(job.config, job.overrides)
    token = uuid.uuid4().hex
    env, lines = environment_of(job, here, token)
    words = command.build(job, port=job.master_port or here.master_port or world.free_port())
    for line in lines:
        print(line, file=sys.stderr)
    print(f"launcher: {shlex.join(words)}", file=sys.stderr, flush=True)
    if dry_run:
        return 0

    def start(attempt: int) -> list[str]:
        if not attempt:
            return words
        if here.kind == "slurm":
            other = world.port(int(env["SLURM_JOB_ID"]), step=attempt, restart=here.restart)
            env["MASTER_PORT"] = str(job.master_port or other)
            return command.build(job, port=int(env["MASTER_PORT"]))
        # nodes that start their own parts have no way to agree on another port
        return words if job.nodes > 1 else command.build(job, port=job.master_port or world.free_port())

    return Supervisor(
        start=start,
        env=env,
        run=folder,
        policy=policy,
        kind=job.kind,
        slurm_job=again.own_job(os.environ) if here.kind == "slurm" else "",
        nodes=job.nodes,
        by_hand=not here.restart,
        records=job.node_rank <= 0,
        on_claim=lambda: resume.remember(folder, job),
    ).supervise()


def environment_of(job: Job, here: World, token: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables of the run and the lines that say where each comes from."""
    wanted = environment.defaults(
        gpus=machine.gpus(),
        cores=machine.cores() if here.kind != "slurm" else int(os.environ.get("SLURM_CPUS_ON_NODE", machine.cores())),
        ranks_per_node=job.ranks_per_node,
        nodes=job.nodes,
        python=job.python,
        master=job.master_addr or here.master_addr,
    )
    env, lines = environment.complete(world.outside(os.environ), wanted)
    if here.kind == "slurm":
        addr, port = job.master_addr or here.master_addr, job.master_port or here.master_port
        env["MASTER_ADDR"], env["MASTER_PORT"] = addr, str(port)
        why = "as asked for" if job.master_addr or job.master_port else "first node, job and restart"
        lines.append(f"MASTER_ADDR={addr} MASTER_PORT={port}  ({why})")
    env[LAUNCH] = token
    if job.kind == "deepspeed" and job.hostfile and job.node_rank < 0:
        env["DS_ENV_FILE"] = _forwarded(env, [default.name for default in wanted])
        lines.append(f"DS_ENV_FILE={env['DS_ENV_FILE']}  (DeepSpeed takes no other variables to the other machines)")
    return env, lines


def _forwarded(env: dict[str, str], names: list[str]) -> str:
    """Write the variables that pdsh must take along. Whose start this is must be known on the first machine too."""
    path = os.path.join(environment.folder(), f"deepspeed_env-{os.getpid()}")
    with open(path, "w", encoding="utf-8") as file:
        file.write("".join(f"{name}={env[name]}\n" for name in [*names, LAUNCH] if name in env))
    return path

"""Where a process stands among the others: ranks, nodes and the meeting point, from any launcher's variables.

The ranks themselves ask `pretrain/engine/process.py`, which knows torch; `tests/launcher/test_world.py` holds both to
the same answers.
"""

from __future__ import annotations

import os
import socket
from typing import Mapping, NamedTuple

from launcher import hostfile
from launcher.job import JobError

FIRST_PORT, PORTS = 20000, 12768  #: up to 32767: from 32768 on Linux gives ports to whoever connects to anything


RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")  #: what a launcher tells each rank
MEETING = ("MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """Which process this is, of which."""

    kind: (
        str  #: "srun" (a rank), "slurm" (a batch script or salloc, no rank), "torchrun", "deepspeed", "openmpi", "none"
    )
    rank: int
    world: int  #: ranks on all nodes
    local_rank: int
    local_world: int  #: ranks on this node
    hosts: tuple[str, ...]  #: of the nodes, where the launcher names them; else only the first, or this one
    master_addr: str
    master_port: int  #: 0: not known, and not needed where there is one rank
    restart: int = 0  #: how often SLURM has put the job back into the queue


def port(job: int, *, step: int = 0, restart: int = 0) -> int:
    """Return the meeting port of a SLURM job's step.

    It differs between jobs that share a node, and between a job's starts: what a killed start leaves behind (a rank
    that was cut off, a socket in TIME_WAIT) must not be met by the next one.
    """
    return FIRST_PORT + (job + 7 * step + 1009 * restart) % PORTS


def free_port() -> int:
    """Return a port that nothing listens on now, for a run on one machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def outside(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that make this process a rank of another run: they would win in the new one.

    A meeting point that comes with them is that run's; by itself it is somebody's wish, and stays.
    """
    foreign = (*RANK, *(MEETING if "RANK" in env else ()))
    return {name: value for name, value in env.items() if name not in foreign}


def read(env: Mapping[str, str] = os.environ) -> World:
    """Return the place that a launcher's variables give this process.

    The launcher nearest to the process wins: torchrun and deepspeed inside of srun, srun inside of a job.

    Raises:
        JobError: variables that cannot be understood or contradict each other.
    """
    try:
        found = _read(env)
    except (ValueError, KeyError) as error:
        raise JobError(f"launcher variables: {error}; start the ranks with one launcher, from a fresh shell") from error
    if not 0 <= found.rank < found.world:
        raise JobError(f"launcher variables: rank {found.rank} of {found.world}; unset RANK and WORLD_SIZE")
    return found


def _read(env: Mapping[str, str]) -> World:
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torch(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return _srun(env)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _openmpi(env)
    if "SLURM_JOB_ID" in env and "SLURM_JOB_NODELIST" in env:
        return _slurm(env)
    return World("none", 0, 1, 0, 1, (socket.gethostname(),), "127.0.0.1", 0)


def _torch(env: Mapping[str, str]) -> World:
    """torchrun and deepspeed give each rank the variables of torch's env://."""
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)
    master = env.get("MASTER_ADDR", "")
    kind = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed"
    return World(
        kind,
        rank,
        world,
        int(env.get("LOCAL_RANK", rank % local)),
        local,
        (master,) if master else (),
        master,
        int(env.get("MASTER_PORT", 0)),
        int(env.get("SLURM_RESTART_COUNT", 0)),
    )


def _openmpi(env: Mapping[str, str]) -> World:
    """mpirun (also DeepSpeed's openmpi launcher) numbers the ranks; the meeting point must be given to it with -x."""
    prefix = "OMPI_COMM_WORLD_"
    world = int(env[prefix + "SIZE"])
    master = env.get("MASTER_ADDR", "")
    return World(
        "openmpi",
        int(env[prefix + "RANK"]),
        world,
        int(env[prefix + "LOCAL_RANK"]),
        int(env.get(prefix + "LOCAL_SIZE", world)),
        (master,) if master else (),
        master,
        int(env.get("MASTER_PORT", 0)),
    )


def _meeting(env: Mapping[str, str], hosts: list[str], step: int) -> tuple[str, int, int]:
    """Return master address, port and restart count of a SLURM job; what is set already wins."""
    restart = int(env.get("SLURM_RESTART_COUNT", 0))
    chosen = port(int(env.get("SLURM_JOB_ID", 0)), step=step, restart=restart)
    return env.get("MASTER_ADDR") or hosts[0], int(env.get("MASTER_PORT") or chosen), restart


def _srun(env: Mapping[str, str]) -> World:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or socket.gethostname()
    hosts = hostfile.expand(nodes)
    world = int(env["SLURM_STEP_NUM_TASKS"])
    tasks = hostfile.counts(env.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    node = int(env.get("SLURM_NODEID", 0))
    addr, number, restart = _meeting(env, hosts, int(env.get("SLURM_STEP_ID", 0)))
    return World(
        "srun",
        int(env["SLURM_PROCID"]),
        world,
        int(env.get("SLURM_LOCALID", 0)),
        tasks[node] if node < len(tasks) else tasks[0],
        tuple(hosts),
        addr,
        number,
        restart,
    )


def _slurm(env: Mapping[str, str]) -> World:
    """Inside a job but not in a step of it: this process starts the ranks and is none of them."""
    hosts = hostfile.expand(env["SLURM_JOB_NODELIST"])
    tasks = hostfile.counts(env.get("SLURM_TASKS_PER_NODE", f"1(x{len(hosts)})"))
    world = int(env.get("SLURM_NTASKS") or sum(tasks))
    addr, number, restart = _meeting(env, hosts, 0)
    return World("slurm", 0, world, 0, tasks[0], tuple(hosts), addr, number, restart)

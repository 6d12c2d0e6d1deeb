"""This process among the others: which rank it is, under any launcher, and its process group.

Works under the deepspeed launcher, torchrun, srun, mpirun and with no launcher at all (world 1).
"""

import importlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as torch_dist

from pretrain.config import ConfigError
from pretrain.engine import recorder

TIMEOUT = timedelta(minutes=30)  # a slow shared disk during a save is not a dead peer


class Place(NamedTuple):
    """Where this process stands."""

    rank: int
    world: int
    local_rank: int  #: on its machine
    local_world: int  #: processes on its machine
    launcher: str  #: "none", "env" (deepspeed, torchrun), "srun" or "openmpi"


def place(env: Mapping[str, str]) -> Place:
    """Return the place that the launcher's variables give this process.

    A batch script of SLURM itself carries SLURM_PROCID=0 without being a step; only a step has SLURM_STEP_NUM_TASKS.

    Raises:
        ConfigError: variables that contradict each other.
    """
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
            local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)
            found = Place(rank, world, int(env.get("LOCAL_RANK", rank % local_world)), local_world, "env")
        elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            world = int(env["SLURM_STEP_NUM_TASKS"])
            tasks = env.get("SLURM_STEP_TASKS_PER_NODE", str(world)).partition("(")[0].partition(",")[0]
            found = Place(int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", 0)), int(tasks), "srun")
        elif "OMPI_COMM_WORLD_RANK" in env:
            rank, world, local_rank, local_world = (
                int(env[f"OMPI_COMM_WORLD_{key}"]) for key in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
            )
            found = Place(rank, world, local_rank, local_world, "openmpi")
        else:
            return Place(0, 1, 0, 1, "none")
    except (ValueError, KeyError) as error:
        raise ConfigError(f"launcher variables: {error}; unset RANK, WORLD_SIZE and LOCAL_RANK or set all") from error
    if not 0 <= found.rank < found.world:
        raise ConfigError(f"launcher variables: rank {found.rank} of {found.world}; unset RANK and WORLD_SIZE")
    return found


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list: node[003-007,9],other -> node003."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.partition(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.partition(",")[0].partition("-")[0] + tail.partition(",")[0]


def slurm_port(env: Mapping[str, str]) -> int:
    """Return where the ranks of a SLURM step meet: the same formula as launcher/world.py, which says why."""
    job, step, restart = (int(env.get(f"SLURM_{key}", "0")) for key in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return 20000 + (job + 7 * step + 1009 * restart) % 12768


def _rendezvous(here: Place, env: dict[str, str]) -> None:
    """Complete the variables that torch's env:// needs (SLURM sets none of them)."""
    env["RANK"], env["WORLD_SIZE"] = str(here.rank), str(here.world)
    env["LOCAL_RANK"], env["LOCAL_SIZE"] = str(here.local_rank), str(here.local_world)
    if here.launcher == "srun":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or socket.gethostname()
        env.setdefault("MASTER_ADDR", first_host(nodes))
        env.setdefault("MASTER_PORT", str(slurm_port(env)))
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if here.world > 1 and key not in env]
    if missing:
        raise ConfigError(
            f"launcher variables: {missing[0]} is not set; use deepspeed, torchrun, srun or mpirun -x {missing[0]}=..."
        )


def _threads(here: Place, *, cuda: bool) -> None:
    """Give each rank its share of the cores: two threads on one core are slower than one."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    torch.set_num_threads(1 if cuda else max(1, cores // here.local_world))


def quiet_deepspeed() -> None:
    """Import DeepSpeed so that it reports only warnings, and only on the main rank."""
    from deepspeed.utils import logger

    # DeepSpeed calls collectives by names that torch 2.14 has renamed: one warning a call, thousands a run
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # torch 2.14 renames collectives that DeepSpeed 0.19 calls by their old names
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logger.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    # Its shared-memory all-reduce serves inference only, yet is compiled at the first start (a minute and a
    # compiler): training never calls it, so it is not built.
    # (By name: the attribute `deepspeed.comm.torch` is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def setup_process_group(*, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group (nccl on GPUs, gloo else) and return this rank's device.

    Raises:
        ConfigError: contradicting launcher variables, or fewer GPUs than processes.
    """
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported
    here = place(os.environ)
    _rendezvous(here, os.environ)  # type: ignore[arg-type]  # _Environ behaves as a dict
    _threads(here, cuda=cuda)
    if cuda and here.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {here.rank} wants GPU {here.local_rank}, this machine shows {torch.cuda.device_count()}; "
            "start at most one process a GPU"
        )
    device = torch.device("cuda", here.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    quiet_deepspeed()
    recorder.switch_on()
    if not torch_dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if here.world == 1:
            store = torch_dist.HashStore()  # type: ignore[attr-defined]  # no port, no neighbour
            torch_dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            torch_dist.init_process_group(backend, timeout=timeout)
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device


def shutdown() -> None:
    """Leave the process group, so that another one can be joined and no warning is printed at exit."""
    if "deepspeed" not in sys.modules:  # never set up, and slow to import
        return
    import deepspeed.comm.comm as ds_comm
    from deepspeed.utils import groups

    backends = _backends()
    if torch_dist.is_initialized():
        with suppress(RuntimeError, ValueError):  # a peer that is gone already
            if ds_comm.cdb is not None:
                ds_comm.destroy_process_group()
            if torch_dist.is_initialized():
                torch_dist.destroy_process_group()
    ds_comm.cdb = None
    groups._WORLD_GROUP = None  # 0.17 keeps its clone of the group that is gone
    del backends  # the last one to let go of them


def _backends() -> list[Any]:
    """Return what moves the bytes of all groups, to be kept until the groups are gone.

    Where a group is the last to hold its gloo backend, torch 2.6 joins the backend's threads without giving up the
    GIL, and a thread that wants the GIL to free the tensor of the collective it has just done is waited for for ever.
    The backend's own Python object gives it up.
    """
    if not torch_dist.is_initialized():
        return []
    made = list(torch_dist.distributed_c10d._world.pg_map)
    return [group._get_backend(device) for group in made for device in group._device_types]


def leave(code: int) -> NoReturn:
    """Exit without tearing down the interpreter.

    Everything is on disk by now. One exit in four of a ZeRO-3 run on gloo died in a C++ destructor of a thread that was
    still running (`terminate called without an active exception`), which a launcher reads as a failed run.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

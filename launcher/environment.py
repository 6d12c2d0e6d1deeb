"""The variables that a run is started with: defaults that have a reason, never instead of what is set already."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from typing import Mapping, NamedTuple

from launcher import machine


class Default(NamedTuple):
    """One variable."""

    name: str
    value: str
    why: str


def defaults(
    *,
    gpus: int,
    cores: int,
    ranks_per_node: int,
    nodes: int,
    python: str = sys.executable,
    master: str = "",
    here: str | None = None,
) -> list[Default]:
    """Return the variables for ranks of which `ranks_per_node` share `cores` and `gpus`.

    `here` is the address that this machine's name stands for (asked of the machine where it is None).
    """
    threads = 1 if gpus else max(1, cores // ranks_per_node)
    caches = os.path.join(folder(), _key(python))
    out = [
        Default(
            "OMP_NUM_THREADS", str(threads), "a rank's share of the cores; two threads on one core are slower than one"
        ),
        Default("PYTHONUNBUFFERED", "1", "lines of the log as they come, also the last ones before a kill"),
        Default("PYTHONFAULTHANDLER", "1", "a crash in C shows where Python was"),
        Default(
            "TOKENIZERS_PARALLELISM", "false", "threads of the tokenizer do not survive the fork of loader workers"
        ),
        Default("TRITON_CACHE_DIR", os.path.join(caches, "triton"), "on this node: a shared home makes its locks hang"),
        Default(
            "TORCH_EXTENSIONS_DIR",
            os.path.join(caches, "extensions"),
            "on this node and one per Python: a build left half done elsewhere blocks the next",
        ),
    ]
    if gpus:
        out += _nccl()
    else:
        out += [
            Default("DS_ACCELERATOR", "cpu", "no GPU here"),
            Default("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "large pages: 1.1 to 1.3 times the samples a second"),
        ]
    if nodes > 1:
        out += _interface(gpus, master, machine.own_address() if here is None else here)
    return out


def folder() -> str:
    """Return this user's folder for small files of launches on this node, made if need be."""
    path = os.path.join(tempfile.gettempdir(), f"diptych-{os.getuid()}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path


def _nccl() -> list[Default]:
    return [
        Default("NCCL_DEBUG", "WARN", "NCCL says why it failed"),
        Default("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", "a rank that lost its peers ends instead of waiting for ever"),
        Default("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", "the last collectives of each rank, for when one hangs"),
        Default("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and written down then"),
    ]


def _interface(gpus: int, master: str, here: str) -> list[Default]:
    toward = machine.interface_to(master) if master else ""
    name = machine.needed_interface(here, machine.interfaces(), toward)
    if not name:
        return []
    why = f"this machine's name stands for {here or 'no address'}, where other nodes cannot reach it"
    names = ["GLOO_SOCKET_IFNAME"] + (["NCCL_SOCKET_IFNAME"] if gpus else [])
    return [Default(variable, name, why) for variable in names]


def _key(python: str) -> str:
    """Return a short name of an environment: what is compiled for one must not be loaded by another."""
    return hashlib.sha256(os.path.abspath(python).encode()).hexdigest()[:12]


def complete(env: Mapping[str, str], wanted: list[Default]) -> tuple[dict[str, str], list[str]]:
    """Return the environment with the defaults that it lacks, and a line to print for each variable."""
    out, lines = dict(env), []
    for name, value, why in wanted:
        if name in env:
            lines.append(f"{name}={env[name]}  (as it was set)")
        else:
            out[name] = value
            lines.append(f"{name}={value}  ({why})")
    return out, lines

"""What one node tells of itself, and how it meets the others; doctor starts it on every node.

    python -m launcher.node facts --folder RUNS
    python -m launcher.node meet --index 1 --count 2 --head node1 --port 23456 --folder RUNS --token WORD

It prints one line, MARK and JSON, so that what a site's login scripts print beside it does no harm.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from typing import Any

from launcher import machine, meeting
from launcher.job import ROOT

MARK = "@diptych-node "
PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "timm", "webdataset", "numpy")
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "CUDA_VISIBLE_DEVICES")


def facts(folder: str) -> dict[str, Any]:
    """Return what can go wrong on a node before a run: GPUs, interfaces, disk, versions."""
    free, _ = machine.free_space(folder)
    return {
        "host": socket.gethostname(),
        "address": machine.own_address(),
        "interfaces": machine.interfaces(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "cores": machine.cores(),
        "gpus_here": machine.gpus(),
        "gpus": gpus(),
        "versions": versions(),
        "free": free,
        "write": write_problem(folder),
        "temporary_free": machine.free_space("/tmp")[0],  # noqa: S108 (where caches of compilers go)
        "shared_memory": machine.free_space("/dev/shm")[1] if os.path.isdir("/dev/shm") else 0,  # noqa: S108
    }


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes; nothing is imported."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "missing"
    out["diptych"] = commit()
    return out


def commit() -> str:
    """Return the commit of this code, with + where files differ from it; "" outside git."""
    words = ["git", "-C", ROOT, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def gpus() -> dict[str, Any]:
    """Return what nvidia-smi says: {"list": [[name, MiB, MiB used, driver], ...], "problem": why it says nothing}."""
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return {"list": [], "problem": ""}
    except (OSError, subprocess.SubprocessError) as error:
        return {"list": [], "problem": str(error)}
    if done.returncode:
        return {"list": [], "problem": (done.stderr or done.stdout).strip().partition("\n")[0]}
    return {"list": [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()], "problem": ""}


def write_problem(folder: str) -> str:
    """Return why a file of 1 MiB cannot be written into a folder, "" where it can: a quota shows in no statistic."""
    path = os.path.join(folder, f".doctor-{socket.gethostname()}-{os.getpid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{errno.errorcode.get(error.errno or 0, '')} {error.strerror}".strip()
    finally:
        with suppress(OSError):
            os.unlink(path)
    return ""


def main(words: list[str] | None = None) -> int:
    """Tell the facts, or meet the others, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog="see launcher/doctor.py")
    parser.add_argument("what", choices=("facts", "meet"))
    parser.add_argument("--folder", default="runs", help="where runs will be written")
    parser.add_argument("--index", type=int, default=int(os.environ.get("SLURM_PROCID", 0)))
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--head", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", default="alone")
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args(words)
    if args.what == "facts":
        found = facts(args.folder)
    else:
        here = meeting.Meeting(args.index, args.count, args.head, args.port, args.folder, args.token, args.seconds)
        found = here.meet()
    print(
        MARK + json.dumps({"index": args.index, "host": socket.gethostname(), "time": time.time(), **found}), flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

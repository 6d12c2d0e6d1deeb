"""Join the process group, sum over all ranks, and say how long it took: what `launcher doctor` starts on every node.

srun --ntasks-per-node=8 python -m pretrain.engine.probe --mib 256
"""

import argparse
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.engine import process

MARK = "@diptych-probe "  #: before the line of JSON that rank 0 prints


def measure(mib: float, *, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Return seconds and GB/s of an all-reduce of `mib` MiB, and the latency of one of 4 bytes. All ranks call it.

    The rate is the bus bandwidth of nccl-tests, 2 (n - 1) / n x bytes / seconds: what each link carries.

    Raises:
        RuntimeError: the sum is wrong, or a rank did not answer.
    """
    world, out = dist.world(), {}
    for name, count in (("latency", 1), ("seconds", max(1, int(mib * 2**18)))):
        best = float("inf")
        for _ in range(repeats):
            values_N = torch.full((count,), float(dist.rank() + 1), device=device)
            _wait(device)
            began = time.perf_counter()
            if world > 1:
                torch_dist.all_reduce(values_N)
            _wait(device)
            best = min(best, time.perf_counter() - began)
            wanted = world * (world + 1) / 2
            if not bool((values_N == wanted).all()):
                raise RuntimeError(f"rank {dist.rank()}: the sum over {world} ranks is {values_N[0]}, not {wanted}")
        out[name] = best
    out["gb_per_s"] = 2 * (world - 1) / world * mib * 2**20 / 1e9 / out["seconds"]
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(words: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: torchrun --nproc-per-node 2 -m pretrain.engine.probe",
    )
    parser.add_argument("--mib", type=float, default=16.0, help="size of the sum")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to wait for the other ranks")
    args = parser.parse_args(words)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    try:
        device = process.setup_process_group(timeout=timedelta(seconds=args.seconds))
        found = measure(args.mib, device=device)
    except (ConfigError, RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
        print(f"error: rank {rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1
    if dist.is_main():
        line = {"ranks": dist.world(), "device": device.type, "mib": args.mib, **found}
        print(MARK + json.dumps(line), flush=True)
    process.shutdown()
    return 0


if __name__ == "__main__":
    process.leave(main())

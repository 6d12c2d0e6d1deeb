"""How long training stands still for a checkpoint: written at once, and written while training goes on.

    python -m tests.benchmarks.checkpoint [--megabytes 100] [--saves 7] [--out tests/benchmarks/results/checkpoint.md]

One rank, fp32, AdamW, stage 1: three numbers a parameter. Per save: the seconds that `save` takes (the stall), and the
time until the checkpoint is complete; both kinds take turns. Steps that fall into a write are timed beside others.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.batch import Batch
from pretrain.engine import checkpoint, process, zero
from pretrain.engine.run_folder import RunFolder

WIDTH = 1024


class Wide(nn.Module):
    """Square layers, enough of them for the state to have a size."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))

    def forward(self, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return a loss of the first batch."""
        return self.layers(batches[0].image_NCHW.flatten(1)).square().mean(), {}


def measure(megabytes: int, saves: int) -> dict[str, Any]:
    """Return medians in seconds by kind of save."""
    device = process.setup_process_group()
    engine = zero.Engine(
        Wide(max(1, round(megabytes * 2**20 / (12 * WIDTH * WIDTH)))),
        zero.Config(stage=1),
        optim_config=zero.optim.Config(),
        precision="fp32",
        rows=16,
        device=device,
    )
    batch = Batch(keys=["k"] * 16, image_NCHW=torch.randn(16, 1, 1, WIDTH)).to(device)

    def step() -> float:
        began = time.perf_counter()
        loss, _ = engine([batch])
        engine.backward(loss)
        savers["async"].block.fence()
        engine.step(1e-4)
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"at once": [], "async": [], "complete": [], "step": [], "step in a write": []}
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder(root)
        folder.claim()
        savers = {
            kind: checkpoint.Checkpoints(folder, checkpoint.Config(keep_last=2, **{"async": kind == "async"}))
            for kind in ("at once", "async")
        }
        for number in range(2 * (saves + 1)):
            kind = ("at once", "async")[number % 2]
            state = {"step": number + 1, "fingerprint": {}}
            seconds["step"] += [step() for _ in range(4)]
            began = time.perf_counter()
            savers[kind].save(engine, state)
            seconds[kind].append(time.perf_counter() - began)
            while savers["async"]._save is not None:
                seconds["step in a write"].append(step())
                if savers["async"].ready:
                    savers["async"].advance()
            if kind == "async":
                seconds["complete"].append(time.perf_counter() - began)
        size = sum(p.stat().st_size for p in checkpoint.complete(folder.checkpoints)[0].iterdir())
    engine.close()
    process.shutdown()
    # the first of each kind asks for its memory
    return {"bytes": size, "first": seconds["async"][0], **{k: statistics.median(v[1:]) for k, v in seconds.items()}}


def main() -> None:
    """Measure, print a table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of weights and moments")
    parser.add_argument("--saves", type=int, default=7, help="of each kind")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.megabytes, args.saves)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {platform.machine()}"
    text = (
        "# Checkpoints\n\n"
        f"`python -m tests.benchmarks.checkpoint --megabytes {args.megabytes} --saves {args.saves}` on {gpu}: "
        f"{found['bytes'] / 2**20:.0f} MiB a checkpoint, medians of {args.saves} saves of each kind in turns.\n\n"
        "| | seconds |\n|---|---|\n"
        f"| training stands still, `checkpoint.async: false` | {found['at once']:.3f} |\n"
        f"| training stands still, `checkpoint.async: true` | {found['async']:.3f} |\n"
        f"| the same, first save (asks for its memory) | {found['first']:.3f} |\n"
        f"| until it is complete, training going on | {found['complete']:.3f} |\n"
        f"| a step, nothing written meanwhile | {found['step']:.3f} |\n"
        f"| a step while a checkpoint is written | {found['step in a write']:.3f} |\n\n"
        f"The stall is {100 * found['async'] / found['at once']:.0f} % of that of a save at once.\n"
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

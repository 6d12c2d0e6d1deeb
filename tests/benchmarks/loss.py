"""The contrastive loss beside open_clip's ClipLoss: time of forward and backward, peak memory, equality.

python -m tests.benchmarks.loss [--peers PYTHON] [--rows 16384] [--device cuda] [--out FILE.md]

On a CPU time is CPU time on one core, laps taking turns (race.py), and memory what a fresh process has at most above
what it had before the loss. On a GPU (`--device cuda`) laps take turns in one process, in fp32 without TF32, and memory
is the allocator's. Features are random unit rows of width 512, N of each side, on one rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.losses.contrastive import contrastive
from tests.benchmarks.race import ONE_THREAD, ROOT, contest, machine, race

WIDTH = 512
LARGE = 65536  #: rows at which two full matrices of logits would take 32 GiB
MIB = 1 << 20


def features(rows: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures and texts [N, E] of unit norm and the temperature at which CLIP starts."""
    draw = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(rows, WIDTH, generator=draw), dim=1).to(device) for _ in range(2)]
    return (
        sides[0].requires_grad_(),
        sides[1].requires_grad_(),
        torch.tensor([1 / 0.07], device=device).requires_grad_(),
    )


def ours(image_NE: Tensor, text_NE: Tensor, scale: Tensor) -> Tensor:
    """Return this project's loss."""
    return contrastive(image_NE, text_NE, scale=scale)


def ours_captions(image_NE: Tensor, text_NE: Tensor, scale: Tensor) -> Tensor:
    """Return this project's loss, told which captions are equal (none is)."""
    return contrastive(image_NE, text_NE, scale=scale, same_B=torch.arange(len(image_NE), device=image_NE.device))


def open_clip(image_NE: Tensor, text_NE: Tensor, scale: Tensor) -> Tensor:
    """Return open_clip's loss."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(image_NE, text_NE, scale)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "ours, equal captions": ours_captions,
    "open_clip": open_clip,
}


def gradients(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and its gradients."""
    loss = LOSSES[name](*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return 1024 * int(line.split()[1])


def memory(name: str, rows: int) -> None:
    """Print the bytes that forward and backward add at most to this process."""
    gradients(name, features(256))  # what is loaded on first use
    inputs = features(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    gradients(name, inputs)
    print(status("VmHWM") - before)


def agreement(rows: int, device: str) -> dict[str, float]:
    """Return how far this project's loss and gradients are from open_clip's, relative to the largest value."""
    inputs = features(rows, device)
    (loss, grads), (their_loss, their_grads) = gradients("ours", inputs), gradients("open_clip", inputs)
    pairs = zip(("loss", "pictures", "texts", "scale"), (loss, *grads), (their_loss, *their_grads))
    return {what: float((a - b).abs().max() / b.abs().max()) for what, a, b in pairs}


def child(python: str, *words: str) -> str:
    """Return the last line that this file prints in a process of its own."""
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    command = [python, __file__, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout.splitlines()[-1]


def on_cpu(rows: int, peers: str, laps: int) -> list[str]:
    """Return the lines of the report, measured on one core."""
    who = {name: peers if name == "open_clip" else sys.executable for name in LOSSES}
    print(f"memory at {rows} rows", flush=True)
    bytes_of = {name: int(child(python, "memory", name, str(rows))) for name, python in who.items()}
    found = race({name: [python, __file__, "lap", name, str(rows)] for name, python in who.items()}, laps=laps)
    seconds = {name: rows / result.median for name, result in found.items()}
    lines = [f"| | CPU s, median of {laps} | of open_clip's | peak MiB | less by |", "|---|---|---|---|---|"]
    for name in LOSSES:
        ratio, factor = seconds[name] / seconds["open_clip"], bytes_of["open_clip"] / bytes_of[name]
        lines.append(f"| {name} | {seconds[name]:.2f} | {ratio:.2f} | {bytes_of[name] / MIB:,.0f} | {factor:.1f} |")
    print("equality", flush=True)
    apart = json.loads(child(peers, "agreement", str(rows)))
    lines += ["", "Apart, relative to the largest value: " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()) + "."]
    print(f"memory at {LARGE} rows: some minutes", flush=True)
    large = int(child(sys.executable, "memory", "ours", str(LARGE)))
    return [*lines, "", f"At {LARGE:,} rows ours takes {large / MIB:,.0f} MiB beside its inputs."]


def on_gpu(rows: int, laps: int) -> list[str]:
    """Return the lines of the report, measured on the GPU; a loss that does not fit says so."""
    inputs, seconds, peaks = features(rows, "cuda"), {n: [] for n in LOSSES}, dict.fromkeys(LOSSES, 0)
    torch.backends.cuda.matmul.allow_tf32 = False
    for lap in range(laps + 1):
        for name in LOSSES:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before, (start, end) = torch.cuda.memory_allocated(), [torch.cuda.Event(enable_timing=True) for _ in "ab"]
            try:
                start.record()
                gradients(name, inputs)
                end.record()
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                continue
            peaks[name] = torch.cuda.max_memory_allocated() - before
            if lap:  # the first is for lazy loading
                seconds[name].append(start.elapsed_time(end) / 1000)
    lines = [f"{torch.cuda.get_device_name()}, fp32, no TF32", "", "| | s, median | peak MiB |", "|---|---|---|"]
    for name, found in seconds.items():
        text = f"{statistics.median(found):.3f} | {peaks[name] / MIB:,.0f}" if found else "out of memory | "
        lines.append(f"| {name} | {text} |")
    return lines


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="the python that has open_clip")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: tests/benchmarks/results/loss.md, or loss_cuda.md")
    args = parser.parse_args()
    out = args.out or ROOT / "tests/benchmarks/results" / ("loss.md" if args.device == "cpu" else "loss_cuda.md")
    measured = on_cpu(args.rows, args.peers, args.laps) if args.device == "cpu" else on_gpu(args.rows, args.laps)
    words = "" if args.device == "cpu" else " --device cuda"
    command = f"python -m tests.benchmarks.loss --rows {args.rows} --laps {args.laps}{words}"
    head = ["# The contrastive loss", "", f"`{command}`", "", f"{machine()}; torch {torch.__version__}", ""]
    text = "\n".join([*head, f"N = {args.rows:,}, D = {WIDTH}, fp32, forward and backward.", "", *measured, ""])
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["lap"]:
        torch.set_num_threads(1)
        given = features(int(words[2]))
        contest(lambda: len(gradients(words[1], given)[1][0]))
    elif words[:1] == ["memory"]:
        memory(words[1], int(words[2]))
    elif words[:1] == ["agreement"]:
        print(json.dumps(agreement(int(words[1]), "cpu")))
    else:
        main()

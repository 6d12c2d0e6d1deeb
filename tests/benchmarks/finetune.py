"""Fine-tuning on cached features beside fine-tuning that encodes every picture anew: epochs a second, method by method.

    python -m tests.benchmarks.finetune [--shots 16] [--laps 5] [--tower vit_small_patch32_224] [--out FILE.md]

Both are this project's own: data.features=cached and off, of the same config, pictures not augmented. A lap is an epoch
of the training loop (loader, forward, backward, update), of the linear probe a whole solution; CPU time on one core,
laps taking turns (race.py). Encoding once is no part of a lap: what it costs is one epoch of the other side.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finetune import main as program
from pretrain import config
from pretrain.exports import diptych
from pretrain.models import text, vision, vlm
from tests import tiny
from tests.benchmarks.race import ROOT, Result, contest, machine, race

CLASSES, SIDE = 8, 256
METHODS = {
    "linear probe": "{name: linear_probe, c: 0.316}",
    "CLIP-Adapter": "{name: clip_adapter}",
    "Tip-Adapter-F": "{name: tip_adapter, train_keys: true}",
    "CoOp": "{name: coop, length: 16}",
}
GOAL = 20  #: times as many epochs a second, where no tower is left to run


def pictures(folder: Path, shots: int) -> Path:
    """Write JPEGs of blurred noise, as many a class as there are shots, and a few to test on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", shots), ("validation", 4), ("test", 2)):
        for number in range(CLASSES * count):
            path = folder / split / f"class_{number % CLASSES}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(noise).resize((SIDE, SIDE)).save(data, "JPEG", quality=90)
            path.write_bytes(data.getvalue())
    return folder


def base(folder: Path, tower: str) -> Path:
    """Write a model of random weights: what an epoch costs does not depend on them."""
    section = vlm.Config(
        vision=vision.Config(name=tower, image_size=224),
        text=text.Config(width=384, layers=6, heads=6, context_length=32),
        embed_dim=384,
    )
    folder.mkdir()
    diptych.Format().write(tiny.pretrained_model(section), folder)
    return folder


def job(folder: Path, method: str, features: str) -> program.Job:
    """Return a run's parts, all on the CPU."""
    tree = f"""
base: {folder}/base
run: {{name: 'run-{features}', dir: {folder}/runs}}
method: {METHODS[method]}
task: {{name: few_shot, data: {folder}/data, shots: null, batch_size: 32}}
data: {{workers: 0, features: '{features}', cache_dir: {folder}/cache}}
train: {{batch_size: 32, epochs: 1}}
optim: {{optimizer: sgd, lr: 0.002}}
"""
    path = folder / f"{features}.yaml"
    path.write_text(tree)
    return program.Job(config.load(program.Recipe, path), torch.device("cpu"))


def lap(folder: Path, method: str, features: str) -> None:
    """Run epochs as the race wants them."""
    made = job(folder, method, features)
    samples = made.splits.samples["train"]
    if made.method.solved(made.recipe.method):
        contest(lambda: bool(made.method.fit(made.read)) * samples)
        return
    with torch.no_grad():
        made.method.prepare(made.read)
    module = made.module.train()
    sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    batches: Iterator = made.training().iterate()

    def epoch() -> int:
        for _ in range(samples // 32):
            loss, _ = module([next(batches)])
            loss.backward()
            sgd.step()
            sgd.zero_grad()
        return samples

    contest(epoch)


def lines(found: dict[str, dict[str, Result]], samples: int) -> list[str]:
    """Return the table: epochs a second of CPU time, how many times as many, and what part of the time is saved."""
    out = ["| | cached, epochs/s | encoded anew, epochs/s | times | time saved |", "|---|---|---|---|---|"]
    for method, both in found.items():
        fast, slow = (both[kind].median / samples for kind in ("cached", "off"))
        out.append(f"| {method} | {fast:.2f} | {slow:.3f} | {fast / slow:.1f} | {100 * (1 - slow / fast):.1f} % |")
    reached = [m for m, both in found.items() if both["cached"].median >= GOAL * both["off"].median]
    return [*out, "", f"At least {GOAL} times as many epochs: {', '.join(reached) or 'none'}."]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--tower", default="vit_small_patch32_224", help="timm's name of the image tower")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/benchmarks/results/finetune.md")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder / "data", args.shots)
        base(folder / "base", args.tower)
        for method in METHODS:
            print(method, flush=True)
            command = [sys.executable, "-m", "tests.benchmarks.finetune", "lap", str(folder), method]
            found[method] = race({kind: [*command, kind] for kind in ("cached", "off")}, laps=args.laps)
    samples = CLASSES * args.shots
    command = f"python -m tests.benchmarks.finetune --shots {args.shots} --laps {args.laps} --tower {args.tower}"
    what = (
        f"{samples} pictures of {SIDE} x {SIDE}, {CLASSES} classes, one thread, CPU time, median of {args.laps} laps."
    )
    head = ["# Fine-tuning on cached features", "", f"`{command}`", "", f"{machine()}; torch {torch.__version__}", ""]
    report = "\n".join([*head, what, "", *lines(found, samples), ""])
    args.out.write_text(report)
    print(report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["lap"]:
        torch.set_num_threads(1)
        lap(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main()

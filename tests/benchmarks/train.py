"""End to end beside open_clip's own trainer: the same shards, architecture, first weights, batch and ranks.

python -m tests.benchmarks.train --peers .venv-bench/bin/python [--case vit_b32 icons] [--rounds 3]
python -m tests.benchmarks.train --peers .venv-bench/bin/python --device cuda      (ViT-B/32, B/16, L/14 in bf16)

The second also tells MFU, memory and how long a save stops training; the loss alone, at the batch of a cluster:
python -m tests.benchmarks.loss --device cuda --rows 131072

Each trainer is started by its own command and judged by its own log. Starts take turns, `--rounds` times. Writes
tests/benchmarks/results/train.md, or train_cuda.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from pretrain import config, pretrained, recipe
from pretrain.engine import peak
from pretrain.exports.open_clip import Format
from pretrain.planning.rehearsal import flop_counter
from pretrain.recipe import Recipe
from tests.benchmarks import pairs, same_batches, where_time_goes
from tests.benchmarks.race import ROOT, machine
from tests.benchmarks.trainers import Lap, Task, read_open_clip, read_ours, run

RESULTS = ROOT / "tests/benchmarks/results"
ICONS = ROOT / "data/iconcaps"


class Case(NamedTuple):
    """A model and how it is trained in this race."""

    config: str
    batch: int  #: of all ranks
    steps: int
    lr: float = 1e-4
    overrides: tuple[str, ...] = ()


# of OpenAI's release, as the config of B/16 but for the widths
L14 = (
    "model.vision.name=vit_large_patch14_clip_224", "model.embed_dim=768",
    "model.text.width=768", "model.text.heads=12",
)  # fmt: skip
# each rank keeps all of the optimizer, as those of DistributedDataParallel do: over gloo, sharding costs more time
WHOLE = ("zero.stage=0",)
CPU = {
    "vit_b32": Case("pretrain/configs/clip_vit_b32.yaml", 32, 7, overrides=WHOLE),
    "icons": Case("pretrain/configs/clip_iconcaps.yaml", 128, 40, 1e-3, overrides=WHOLE),
}
CUDA = {
    "vit_b32": Case("pretrain/configs/clip_vit_b32.yaml", 2048, 60),
    "vit_b16": Case("pretrain/configs/clip_vit_b16.yaml", 1024, 60),
    "vit_l14": Case("pretrain/configs/clip_vit_b16.yaml", 256, 60, overrides=L14),
}
TITLES = {"vit_b32": "ViT-B/32", "vit_b16": "ViT-B/16", "vit_l14": "ViT-L/14", "icons": "the demo's towers"}


def overrides(case: Case, icons: Path) -> tuple[str, ...]:
    """Return what is changed in the case's config beside the data."""
    return (*case.overrides, *([f"model.tokenizer={icons}/tokenizer"] if "iconcaps" in case.config else []))


def write_start(case: Case, folder: Path, changes: tuple[str, ...]) -> tuple[Recipe, pretrained.Pretrained]:
    """Write the first weights, which our run will draw from its seed as well, as a folder of open_clip."""
    section = config.load(Recipe, str(ROOT / case.config), list(changes))
    words = recipe.build_tokenizer(section.model)
    model = recipe.build_mixture(section, words).model
    start = pretrained.Pretrained(
        model=model,
        tokenizer=words,
        transform=recipe.build_transform(section.model),
        composer=recipe.build_composer(section.model, words),
        config=model.config,
        weights_hash="",
        source="a fresh model",
    )
    folder.mkdir(parents=True)
    writer = Format()
    writer.write(start, folder)
    writer.settle(folder, folder)
    return section, start


def longest(task: Task, start: pretrained.Pretrained) -> int:
    """Return the tokens of the longest caption of the shards, both ends included."""
    limit = start.config.text.context_length
    return max(len(start.tokenizer.encode(text, limit)) for text in pairs.captions(task.shards))


def gflops(start: pretrained.Pretrained, length: int) -> float:
    """Return the GFLOP of one pair, forward and backward (twice the forward), with texts of `length` tokens."""
    size, model = start.config.vision.image_size, start.model
    with flop_counter() as counter, torch.no_grad():
        model.vision(torch.zeros(1, 3, size, size))
        model.text(torch.full((1, length), start.tokenizer.end, dtype=torch.int64))
    return 3 * counter.get_total_flops() / 1e9


def compete(task: Task, python: str, folder: Path, *, rounds: int, cut: int) -> dict[str, list[Lap]]:
    """Start the contestants in turn; return their laps."""

    def ours(place: Path) -> Lap:
        run(task.ours(place), place, ranks=task.ranks, device=task.device)
        return read_ours(place)

    def theirs(context: int | None) -> Callable[[Path], Lap]:
        def lap(place: Path) -> Lap:
            run(task.open_clip(python, place, context=context), place, ranks=task.ranks, device=task.device)
            return read_open_clip(place)

        return lap

    contestants = {"open_clip": theirs(None), f"open_clip, context cut to {cut}": theirs(cut), "diptych": ours}
    laps: dict[str, list[Lap]] = {name: [] for name in contestants}
    with tqdm(total=rounds * len(contestants), desc="starts", unit="start") as bar:
        for _ in range(rounds):
            for name, lap in contestants.items():
                laps[name].append(lap(folder / "run"))
                bar.write(f"  {name:36s} {laps[name][-1].rate:10,.1f} pairs/s")
                bar.update()
    return laps


def table(laps: Mapping[str, list[Lap]], flops: Mapping[str, float] | None) -> list[str]:
    """Return the rows of a case: medians over all counted steps, ratios of the rounds."""
    first = next(iter(laps.values()))
    rows = []
    for name, found in laps.items():
        rates = [rate for lap in found for rate in lap.rates]
        waits = statistics.median(wait for lap in found for wait in lap.waits)
        ratios = [lap.rate / other.rate for lap, other in zip(found, first)]
        by_round = ", ".join(f"{lap.rate:,.1f}" for lap in found)
        row = f"| {name} | {statistics.median(rates):,.1f} | {by_round} | {statistics.median(ratios):.2f} | {waits:.3f}"
        if flops is not None:
            memory, stall = found[-1].memory, found[-1].stall
            top = peak.of(torch.device("cuda"), "bf16")
            mfu = f"{100 * statistics.median(rates) * flops[name] * 1e9 / top:.1f} %" if top else "unknown"
            row += f" | {mfu} | {_known(memory)} | {_known(stall)}"
        rows.append(row + " |")
    return rows


def _known(value: float | None) -> str:
    return "not told" if value is None else f"{value:.2f}"


def lines_of_case(name: str, case: Case, args: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """Run a case; yield the parts of its section as they are known: the race, where time goes, equal losses."""
    cuda = args.device == "cuda"
    if name == "icons":
        shards = pairs.write_icons(folder / "pairs", args.icons)
    else:
        count, copies = (2048, 32) if cuda else (256, 1)
        shards = pairs.write_photographs(folder / "pairs", count, width=320, height=256, copies=copies)
    changes = overrides(case, args.icons)
    section, start = write_start(case, folder / "start", changes)
    task = Task(
        config=case.config,
        overrides=changes,
        shards=shards,
        start=folder / "start",
        batch=args.batch or case.batch,
        steps=args.steps or case.steps,
        ranks=args.ranks,
        device=args.device,
        precision="bf16" if cuda else "fp32",
        workers=args.workers,
        lr=case.lr,
        save=cuda,
    )
    cut = longest(task, start)
    laps = compete(task, args.peers, folder, rounds=args.rounds, cut=cut)
    full, short = gflops(start, start.config.text.context_length), gflops(start, cut)
    flops = dict(zip(laps, (full, short, short))) if cuda else None
    words = [len(text.split()) for text in pairs.captions(task.shards)]
    head = "| | pairs/s | by round | ratio | wait for data, s |" + (" MFU | GiB | save stall, s |" if cuda else "")
    yield [
        f"## {TITLES[name]}",
        "",
        f"`{case.config}`, batch {task.batch} on {task.ranks} rank(s), {task.precision}; captions of {min(words)} to "
        f"{max(words)} words (mean {statistics.mean(words):.1f}), at most {cut} tokens. A pair is {full:.2f} GFLOP at "
        f"{start.config.text.context_length} tokens, {short:.2f} at {cut}.",
        command(args),
        "",
        head,
        "|" + "---|" * (head.count("|") - 1),
        *table(laps, flops),
        "",
    ]
    yield where_time_goes.lines(task, args.peers, folder)
    yield same_batches.lines(task, section, start, args.peers, folder)


def main() -> int:
    """Run the cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="Python of the peers' environment, which `make bench` builds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", nargs="+", help="default: all of the device")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each trainer, in turn")
    parser.add_argument("--steps", type=int, help="of a start; default: as the case says")
    parser.add_argument("--batch", type=int, help="of all ranks; default: as the case says")
    parser.add_argument("--ranks", type=int, help="default: 2 on a CPU, one for each GPU")
    parser.add_argument("--workers", type=int, help="loading processes of a rank; default: 0 on a CPU, 12 on a GPU")
    parser.add_argument("--icons", type=Path, default=ICONS, help="the demo's data, for its words and pictures")
    parser.add_argument("--folder", help="where pairs and runs are written; default: a temporary folder")
    args = parser.parse_args()
    cases, cuda = (CUDA, True) if args.device == "cuda" else (CPU, False)
    args.ranks = args.ranks or (torch.cuda.device_count() if cuda else 2)
    args.workers = (12 if cuda else 0) if args.workers is None else args.workers
    chosen = args.case or list(cases)
    if unknown := set(chosen) - set(cases):
        parser.error(f"--case {sorted(unknown)[0]}: not a case of {args.device}; there are {', '.join(cases)}")
    path = RESULTS / ("train_cuda.md" if cuda else "train.md")
    path.parent.mkdir(exist_ok=True)
    for name in chosen:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            lines: list[str] = []
            for more in lines_of_case(name, cases[name], args, Path(folder)):
                write_case(path, name, list(cases), lines := [*lines, *more])
    print(path.read_text())
    return 0


def write_case(path: Path, name: str, order: list[str], lines: list[str]) -> None:
    """Put a case's lines into the page; the other cases stay as they were measured."""
    _, *found = path.read_text().split("\n## ") if path.exists() else [""]
    sections = {section.partition("\n")[0]: f"## {section.strip()}\n" for section in found}
    sections[TITLES[name]] = "\n".join(lines).strip() + "\n"
    known = [sections[TITLES[case]] for case in order if TITLES[case] in sections]
    path.write_text("\n".join([*heading(), *known]))


def command(args: argparse.Namespace) -> str:
    """Return how and where a case was measured."""
    where = machine() if args.device == "cpu" else f"{args.ranks} x {torch.cuda.get_device_name()}; {machine()}"
    words = " ".join(["python -m tests.benchmarks.train", *_without_paths(sys.argv[1:])])
    versions = f"torch {version('torch')}, deepspeed {version('deepspeed')}, open_clip_torch 3.3.0"
    return f"`{words}`, {args.rounds} rounds. {where}; {versions}; load of the machine {os.getloadavg()[2]:.1f}."


def heading() -> list[str]:
    """Return what the page says of all cases."""
    return [
        "# Training end to end, beside open_clip's trainer",
        "",
        "Both train the same architecture from the same weights on the same shards, with equal batch, ranks, threads,",
        "memory pages, loading processes and augmentation, each started by its own command and judged by its own log",
        "(all steps but the first 2 of a start); starts take turns, for some rounds. `by round`: each start's",
        "median. `ratio`: to open_clip, the middle one of the rounds. open_clip runs with `--local-loss",
        "--gather-with-grad`; 3.3.0 cannot run several ranks on a CPU, where one argument of",
        "DistributedDataParallel is left out. Load: of all programs, 15 minutes, at the end of a case.",
        "",
    ]


def _without_paths(words: list[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in words]


if __name__ == "__main__":
    sys.exit(main())

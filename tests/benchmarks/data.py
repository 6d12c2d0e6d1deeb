"""The data engine beside its peers, in one run on the same tars: `make bench`. Writes tests/benchmarks/results/data.md.

python -m tests.benchmarks.data --peers .venv-bench/bin/python [--laps 7] [--shards 10000] [--folder FOLDER]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from pretrain.data import synthetic
from pretrain.data.format import ShardWriter, write_manifest
from tests.benchmarks import photographs
from tests.benchmarks.race import ROOT, Result, machine, race

SETS = {"256 x 256 q95": (256, 256, 95), "500 x 375 q90": (500, 375, 90)}
SHARDS, SAMPLES = 4, 96
OURS, PEERS = str(ROOT / "tests/benchmarks/ours.py"), str(ROOT / "tests/benchmarks/peers.py")
RESULTS = ROOT / "tests/benchmarks/results/data.md"


def write_photographs(folder: Path, width: int, height: int, quality: int) -> tuple[str, float]:
    """Write indexed shards of photographs with captions; return their pattern and the mean kB of a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    counts, total = {}, 0
    for shard in range(SHARDS):
        path = folder / f"photographs-{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for number in tqdm(
                range(shard * SAMPLES, (shard + 1) * SAMPLES), desc=path.name, leave=False, mininterval=5
            ):
                data = photographs.jpeg(width, height, seed=number, quality=quality)
                total += len(data)
                writer.add(f"{number:08d}", {"jpg": data, "txt": photographs.caption(number).encode()})
        counts[path.name] = (SAMPLES, path.stat().st_size)
    write_manifest(folder, counts, {})
    return f"{folder}/photographs-{{00000..{SHARDS - 1:05d}}}.tar", total / SHARDS / SAMPLES / 1000


def copy_shards(folder: Path, count: int, *, indexed: bool) -> str:
    """Write a shard of 16 samples `count` times over, as hard links; return their pattern."""
    [first] = synthetic.write(folder / "one", shards=1, samples=16, size=12)
    counts = {}
    for number in tqdm(range(count), desc="linking shards", leave=False):
        path = folder / f"copy-{number:05d}.tar"
        os.link(first, path)
        if indexed:
            os.link(first.with_suffix(".idx"), path.with_suffix(".idx"))
        counts[path.name] = (16, first.stat().st_size)
    if indexed:
        write_manifest(folder, counts, {})
    return f"{folder}/copy-{{00000..{count - 1:05d}}}.tar"


PIPELINES = {
    "open_clip": "open_clip's own pipeline",
    "fast": "`data.decode: fast`",
    "normalised": "`fast`, normalised on the CPU too",
    "exact": "`data.decode: exact`",
    "decoder": "simplejpeg alone, full size",
}
RAW = {
    "webdataset": f"`WebDataset(...)` {version('webdataset')}",
    "older webdataset": "`WebDataset(...)` 0.2.86",
    "records": "records in training order",
}


def rate(folder: Path, peers: str, *, laps: int) -> list[str]:
    """Return the rows of (a) training batches and (b) raw samples."""
    rows = []
    for name, (width, height, quality) in SETS.items():
        shards, size = write_photographs(folder / f"{width}", width, height, quality)
        commands = {what: [sys.executable, OURS, what, shards] for what in PIPELINES}
        commands["open_clip"] = [peers, PEERS, "open_clip", shards]
        rows += table(f"{name}, {size:.0f} kB a picture", PIPELINES, race(commands, laps=laps))
    shards = f"{folder}/256/photographs-{{00000..{SHARDS - 1:05d}}}.tar"
    commands = {
        "webdataset": [sys.executable, PEERS, "webdataset", shards],
        "older webdataset": [peers, PEERS, "webdataset", shards],
        "records": [sys.executable, OURS, "records", shards],
    }
    return rows + table("raw samples, no decoding (256 x 256, jpg + txt)", RAW, race(commands, laps=laps))


def table(title: str, names: Mapping[str, str], found: Mapping[str, Result]) -> list[str]:
    """Return lines of a table, with ratios to its first contestant."""
    first = found[next(iter(names))].median
    lines = [f"| {names[key]} | {found[key]} | {found[key].median / first:.2f} |" for key in names]
    return [f"| **{title}** | | |", *lines]


def starts(folder: Path, *, shards: int) -> list[str]:
    """Return lines about (c) the time to the first batch and the first indexing of many shards."""

    def seconds(what: str, pattern: str) -> list[float]:
        command = [sys.executable, OURS, what, pattern]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    known = copy_shards(folder / "indexed", shards, indexed=True)
    tries = [seconds("first_batch", known)[:2] for _ in range(5)]
    wall, cpu = (statistics.median(column) for column in zip(*tries))
    lines = [
        f"- first batch of 64, {shards:,} indexed shards, no workers: {wall:.2f} s ({cpu:.2f} s of CPU), median of 5"
    ]
    wall, cpu, samples = seconds("indexing", copy_shards(folder / "foreign", shards, indexed=False))
    lines.append(f"- first indexing of {shards:,} shards ({samples:,.0f} samples): {wall:.1f} s ({cpu:.1f} s of CPU)")
    return lines


def main() -> int:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="Python of the peers' environment, which `make bench` builds")
    parser.add_argument("--laps", type=int, default=7, help="laps of each contestant, interleaved")
    parser.add_argument("--shards", type=int, default=10_000, help="shards of the test of the first batch")
    parser.add_argument("--folder", help="where tars are written; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = rate(Path(folder), args.peers, laps=args.laps)
        rows_of_starts = starts(Path(folder), shards=args.shards)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(rows, rows_of_starts, laps=args.laps, shards=args.shards))
    print(RESULTS.read_text())
    return 0


def report(rows: list[str], lines: list[str], *, laps: int, shards: int) -> str:
    """Return the results as a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pillow", "simplejpeg"))
    return "\n".join(
        [
            "# The data engine beside its peers",
            "",
            f"`make bench`: {laps} laps each, interleaved, one thread, no worker processes. {machine()}; {versions}.",
            "Samples per second of CPU time (user + system): median [least, most], ratio to the first of each kind.",
            "Training batches: read, decode, RandomResizedCrop to 224, 77 tokens, batches of 64. Peer: open_clip_torch",
            "3.3.0, `get_wds_dataset` on webdataset 0.2.86. It makes normalised floats; we make bytes, which the tower",
            "normalises on its device: the third row of each set does that on the CPU as well. `exact` is Pillow's own",
            "resize and crop, as the peer's, without floats.",
            "Pictures are made up: as many bytes as photographs of that size.",
            "",
            "| | samples/s/core | ratio |",
            "|---|---|---|",
            *rows,
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

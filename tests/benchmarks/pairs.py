"""Pairs for the race of trainers: photographs, or the demo's icons, with captions of 4 to 20 words in their txt member.

Letters: H W = height, width.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain.data import format, index
from pretrain.data.format import ShardWriter, write_manifest
from tests.benchmarks import photographs

LEAST, MOST = 4, 20  #: words of a caption
SHARDS = 8
WORDS = (
    "a", "the", "of", "and", "with", "in", "on", "near", "under", "behind", "small", "large", "old", "red",
    "blue", "green", "dark", "bright", "quiet", "crowded", "wooden", "morning", "evening", "river", "street",
    "bridge", "market", "harbour", "kitchen", "window", "garden", "mountain", "bicycle", "train", "boat",
    "child", "woman", "man", "dog", "horse", "owl", "bird", "tree", "stone", "table", "lamp", "basket",
    "umbrella", "photograph", "taken", "standing", "looking", "walking", "sleeping", "carrying", "while",
    "people", "watch", "snow", "rain", "light", "shadow",
)  # fmt: skip


def sentence(seed: int) -> str:
    """Return LEAST to MOST words; equal seeds give equal words."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    count = int(rng.integers(LEAST, MOST + 1))
    return " ".join(WORDS[int(i)] for i in rng.integers(len(WORDS), size=count))


def write_photographs(folder: Path, samples: int, *, width: int, height: int, copies: int = 1) -> str:
    """Write JPEG shards and return their pattern; each shard is there `copies` times, as hard links.

    Copies make a set that is large enough for a fast machine without minutes of drawing: trainers read and decode each
    of them anew.
    """

    def draw(number: int) -> dict[str, bytes]:
        picture = photographs.jpeg(width, height, seed=number, quality=92)
        return {"jpg": picture, "txt": sentence(number).encode()}

    folder.mkdir(parents=True, exist_ok=True)
    made = (draw(number) for number in tqdm(range(samples), desc="drawing photographs", leave=False))
    return _write(folder, made, samples, copies=copies)


def write_icons(folder: Path, source: Path) -> str:
    """Write the demo's training icons with one of their captions of LEAST words or more; return the pattern.

    Raises:
        FileNotFoundError: the demo's data has not been built.
    """
    paths = sorted(source.glob("train-*.tar"))
    if not paths:
        raise FileNotFoundError(f"{source}: no icons; run `python -m data_tools build --recipe iconcaps --out DIR`")
    folder.mkdir(parents=True, exist_ok=True)
    samples = [sample for path in paths for sample in _icons(path)]
    return _write(folder, iter(samples), len(samples))


def _icons(path: Path) -> Iterator[dict[str, bytes]]:
    with open(path, "rb") as file:
        for number, entry in enumerate(format.scan(path)):
            members = format.read_members(file, entry)
            long = [c.split() for c in json.loads(members["json"])["captions"] if len(c.split()) >= LEAST]
            if long:
                yield {"png": members["png"], "txt": " ".join(long[number % len(long)][:MOST]).encode()}


def _write(folder: Path, samples: Iterator[dict[str, bytes]], total: int, *, copies: int = 1) -> str:
    counts, number = {}, 0
    for shard in range(SHARDS):
        path = folder / f"pairs-{shard:05d}.tar"
        size = total // SHARDS + (shard < total % SHARDS)
        with ShardWriter(path) as writer:
            for _ in range(size):
                writer.add(f"{number:08d}", next(samples))
                number += 1
        counts[path.name] = (size, path.stat().st_size)
        for copy in range(1, copies):
            link = folder / f"pairs-{copy * SHARDS + shard:05d}.tar"
            os.link(path, link)
            os.link(path.with_suffix(".idx"), link.with_suffix(".idx"))
            counts[link.name] = counts[path.name]
    write_manifest(folder, counts, {})
    return f"{folder}/pairs-{{00000..{copies * SHARDS - 1:05d}}}.tar"


def captions(pattern: str) -> list[str]:
    """Return all captions of the shards (of copies: once)."""
    out = []
    for path in index.expand(pattern)[:SHARDS]:
        with open(path, "rb") as file:
            out += [format.read_members(file, entry)["txt"].decode() for entry in format.scan(path)]
    return out

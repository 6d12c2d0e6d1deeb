"""What a shard holds, counted: sizes, shapes, formats, words, tokens; and a few samples chosen by hash of their key."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools import _audit, _pack, _rows, _tar
from pretrain.data import headers
from pretrain.data.decode import BadSample

VERSION = 1
FINE = 4  # bins an octave: of sides, shapes and bytes


class Ask(NamedTuple):
    """What a worker is told."""

    path: Path
    tokenizer: str | None = None
    pictures: int = 24
    seed: int = 0


def octave(value: float) -> int:
    """Return the bin of a positive number on a logarithmic scale with FINE bins an octave."""
    return math.floor(FINE * math.log2(value) + 1e-9)


def surveyed(asked: Ask) -> bytes:
    """Return the counts of one shard."""
    names = ("kind", "size", "side", "aspect", "bytes", "words", "tokens", "captions", "bad")
    counts: dict[str, Counter[Any]] = {name: Counter() for name in names}
    marks: list[int] = []
    texts: list[str] = []
    draws: list[tuple[int, int]] = []
    entries = headers.entries_of(asked.path)
    with _tar.opened(asked.path) as tar:
        for row, entry in enumerate(entries):
            draws.append((_rows.mark(asked.seed, asked.path.name, entry.key), row))
            try:
                picture, captions = tar.picture(entry), tar.captions(entry)
            except BadSample as error:
                counts["bad"][str(error).partition(" (")[0].partition(":")[0]] += 1
                marks.append(0)
                continue
            kind, width, height, size = picture
            counts["kind"][kind] += 1
            counts["size"][octave(width) // 2, octave(height) // 2] += 1
            counts["side"][octave(min(width, height))] += 1
            counts["aspect"][round(FINE * math.log2(width / height))] += 1
            counts["bytes"][octave(size)] += 1
            counts["captions"][len(captions)] += 1
            counts["words"].update(len(caption.split()) for caption in captions)
            marks.append(_audit.mark(captions[0]))
            texts.extend(captions if asked.tokenizer is not None else ())
    if texts and asked.tokenizer is not None:
        counts["tokens"].update(_audit.token_counts(asked.tokenizer, texts))
    tree = {
        "samples": len(entries),
        "bytes": asked.path.stat().st_size,
        "counts": {name: sorted(found.items()) for name, found in counts.items()},
        "draws": sorted(draws)[: asked.pictures],
    }
    return _pack.pack(tree, captions=np.array(marks, np.uint64))

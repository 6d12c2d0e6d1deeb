"""From fingerprints of all samples to a decision: who is like whom, and who goes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools import _duplicates, _engine, _fingerprint, _minhash, _pack, _rows

HELD_OUT = ("validation", "val", "test")  # splits of which a copy stays rather than one of train


class Found(NamedTuple):
    """What was decided about N samples of the set and, after them, those of the held-out set."""

    rows: _rows.Rows  #: of the set alone
    all_rows: _rows.Rows
    onto_N: NDArray[np.int64]  #: the sample that stays instead, or KEPT
    why_N: NDArray[np.int64]
    reasons: list[str]
    looks_N: NDArray[np.uint64]
    bad: int  #: samples of which no picture could be read; they stay


def find(
    source: Sequence[_rows.Shard],
    *,
    held: int,
    args: argparse.Namespace,
    state: Path,
    engine: _engine.Engine,
) -> Found:
    """Return what goes; the last `held` shards are the held-out set."""
    looks, bands = args.image_distance >= 0, args.caption_similarity is not None and args.caption_similarity < 1
    asked = [_fingerprint.Ask(shard.path, looks, bands) for shard in source]
    tasks = [
        _engine.Task(
            f"marks-{number:06d}",
            ask,
            _engine.digest(ask.path, ask[1:], _fingerprint.VERSION),
            ask.path.stat().st_size,
        )
        for number, ask in enumerate(asked)
    ]
    parts = [
        _pack.unpack(result)
        for result in _engine.run(_fingerprint.fingerprints, tasks, state=state, engine=engine, doing="compare")
    ]
    marks = {name: np.concatenate([arrays[name] for _, arrays in parts]) for name in parts[0][1]}
    all_rows = _rows.all_rows(source)
    own = int(sum(len(shard.lines) for shard in source[: len(source) - held]))
    stay_N = np.arange(len(all_rows)) >= own
    cover_N = stay_N if args.only_against else np.ones(len(stay_N), bool)
    criteria = _criteria(args, marks, parts)
    order = _order(source, all_rows, marks["pixels"], args.prefer)
    if args.match == "both":
        onto_N, why_N = _duplicates.decide_both(criteria[:-1], criteria[-1], order, stay_N, cover_N)
    else:
        onto_N, why_N = _duplicates.decide(criteria, order, stay_N, cover_N)
    bad = sum(tree["bad"] for tree, _ in parts[: len(source) - held])
    return Found(all_rows[:own], all_rows, onto_N, why_N, [c.name for c in criteria], marks["looks"], bad)


def _criteria(
    args: argparse.Namespace, marks: dict[str, NDArray[np.uint64]], parts: Sequence[tuple[Any, object]]
) -> list[_duplicates.Criterion]:
    none = np.zeros((0, 2), np.int64)
    found = [_duplicates.criterion("bytes", marks["images"], none[:, 0], none)]
    if args.image_distance >= 0:
        found.append(_duplicates.image_criterion(marks["looks"], marks["colours"], args.image_distance))
    if args.caption_similarity is not None:
        first_P = _first(marks["captions"])
        pairs = none
        if args.caption_similarity < 1:
            texts = [text for tree, _ in parts for text in tree["texts"]]
            chosen = [texts[at] for at in first_P.tolist()]
            pairs = _minhash.pairs_within(chosen, marks["bands"][first_P], args.caption_similarity)
        found.append(_duplicates.criterion("caption", marks["captions"], first_P, pairs))
    return found


def _first(mark_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return where each mark but NONE comes first, in that order."""
    different, first = np.unique(mark_N, return_index=True)
    return np.sort(first[different != _fingerprint.NONE])


def _order(
    source: Sequence[_rows.Shard], all_rows: _rows.Rows, pixels_N: NDArray[np.uint64], prefer: str
) -> NDArray[np.int64]:
    late = np.array([_rows.prefix_of(shard.path) not in HELD_OUT for shard in source])[all_rows[:, 0]]
    small = -pixels_N.astype(np.int64) if prefer == "largest" else np.zeros(len(all_rows), np.int64)
    return np.lexsort((np.arange(len(all_rows)), small, late))

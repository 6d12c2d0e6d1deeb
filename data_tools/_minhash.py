"""Captions that are nearly equal: MinHash over runs of five letters, bands of it to find candidates, Jaccard to decide.

Broder 1997; two captions of similarity 0.8 share a band with probability 0.9998, of 0.5 with 0.64.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RUN = 5  # letters
BANDS, ROWS = 16, 4
CROWD = 16  # members of a band that each other one is compared with: template captions would be compared for ever

_rng = np.random.Generator(np.random.Philox(key=0x6D696E68617368))
_FACTOR_P = _rng.integers(1, 1 << 63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFT_P = _rng.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def plain(caption: str) -> str:
    """Return a caption without case, punctuation and extra spaces: what is equal here counts as the same caption."""
    return " ".join(re.findall(r"\w+", caption.casefold()))


def bands(text: str) -> NDArray[np.uint64]:
    """Return one number for each band; captions that share one are candidates."""
    data = np.frombuffer(text.encode("utf-8", "surrogateescape").ljust(RUN, b" "), np.uint8).astype(np.uint64)
    runs_R = sum((data[at : len(data) - RUN + 1 + at] << np.uint64(8 * at) for at in range(RUN)), start=np.uint64(0))
    runs_R = runs_R * _MIX
    runs_R ^= runs_R >> np.uint64(29)
    lowest_P = ((_FACTOR_P[:, None] * runs_R[None] + _SHIFT_P[:, None]) >> np.uint64(32)).min(1)
    mixed = np.zeros(BANDS, np.uint64)
    for column_B in lowest_P.reshape(BANDS, ROWS).T:
        mixed = (mixed ^ column_B) * _MIX
        mixed ^= mixed >> np.uint64(31)
    return mixed


def similarity(one: str, two: str) -> float:
    """Return the Jaccard similarity of two texts' runs of letters."""
    a, b = ({text[at : at + RUN] for at in range(max(1, len(text) - RUN + 1))} for text in (one, two))
    return len(a & b) / len(a | b)


def pairs_within(texts: Sequence[str], band_NB: NDArray[np.uint64], least: float) -> NDArray[np.int64]:
    """Return the (i, j), i < j, of texts at least so similar, as far as bands find them, sorted."""
    candidates: set[tuple[int, int]] = set()
    for column_N in band_NB.T:
        order_N = np.argsort(column_N, kind="stable")
        edges = np.flatnonzero(np.diff(column_N[order_N])) + 1
        for start, stop in itertools.pairwise([0, *edges.tolist(), len(order_N)]):
            members = order_N[start:stop].tolist() if stop - start > 1 else []
            candidates.update((a, b) for at, b in enumerate(members) for a in members[: min(at, CROWD)])
    found = sorted(pair for pair in candidates if similarity(texts[pair[0]], texts[pair[1]]) >= least)
    return np.array(found, np.int64).reshape(-1, 2)

"""Which of several like samples stays: the first in the given order; every other one names the kept one it is like.

Being like is no chain: a sample goes only if a sample that stays is like it, not if another one that goes is.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools import _near, _phash

KEPT = -1
MIX = np.uint64(0x9E3779B97F4A7C15)


class Criterion(NamedTuple):
    """One way of being alike."""

    name: str
    value_N: NDArray[np.int64]  #: equal numbers are alike; -1 is like nothing
    near: dict[int, list[int]]  #: number -> other numbers that are alike, too


def criterion(
    name: str, mark_N: NDArray[np.uint64], first_P: NDArray[np.int64], pairs_P2: NDArray[np.int64]
) -> Criterion:
    """Return a criterion from marks (0: none) and pairs of near ones, as numbers in `first_P` of samples."""
    _, value_N = np.unique(mark_N, return_inverse=True)
    value_N = np.where(mark_N == 0, KEPT, value_N.reshape(-1))
    near: dict[int, list[int]] = defaultdict(list)
    for a, b in value_N[first_P[pairs_P2]].tolist() if len(pairs_P2) else ():
        near[a].append(b)
        near[b].append(a)
    return Criterion(name, value_N, dict(near))


def image_criterion(look_N: NDArray[np.uint64], colour_N: NDArray[np.uint64], distance: int) -> Criterion:
    """Return the criterion of pictures with hashes at most `distance` bits apart and close mean colours."""
    mark_N = np.where(look_N == 0, np.uint64(0), look_N * MIX ^ (colour_N + np.uint64(1)) * (MIX >> np.uint64(17)))
    different, first_P = np.unique(mark_N, return_index=True)
    first_P = first_P[different != 0]
    colour_P = colour_N[first_P].astype(np.uint16)
    pairs = _near.pairs_within(look_N[first_P], distance)
    pairs = pairs[_phash.same_colour(colour_P[pairs[:, 0]], colour_P[pairs[:, 1]])]
    return criterion("image", mark_N, first_P, pairs)


def decide(
    criteria: Sequence[Criterion], order: NDArray[np.int64], stay_N: NDArray[np.bool_], cover_N: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each sample the kept one that it is like (or KEPT), and which criterion says so first.

    `stay_N` names samples that stay whatever they are like; they come first. Others go if they are like a kept sample
    of `cover_N`.
    """
    onto_N, why_N = (np.full(len(order), KEPT, np.int64) for _ in range(2))
    values = [one.value_N.tolist() for one in criteria]
    covered: list[dict[int, int]] = [{} for _ in criteria]  # value -> the kept sample that is like it
    for at in [*order[stay_N[order]].tolist(), *order[~stay_N[order]].tolist()]:
        if not stay_N[at]:
            why = next((c for c, found in enumerate(covered) if values[c][at] in found), KEPT)
            if why != KEPT:
                onto_N[at], why_N[at] = covered[why][values[why][at]], why
                continue
        for c, found in enumerate(covered if cover_N[at] else ()):
            value = values[c][at]
            if value != KEPT:
                for like in (value, *criteria[c].near.get(value, ())):
                    found.setdefault(like, at)
    return onto_N, why_N


def decide_both(
    pictures: Sequence[Criterion],
    caption: Criterion,
    order: NDArray[np.int64],
    stay_N: NDArray[np.bool_],
    cover_N: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what `decide` returns where picture and caption must be like those of the same kept sample."""
    onto_N, why_N = (np.full(len(order), KEPT, np.int64) for _ in range(2))
    values = [one.value_N.tolist() for one in pictures]
    words = caption.value_N.tolist()
    covered: list[dict[int, list[int]]] = [defaultdict(list) for _ in pictures]  # value -> all kept that are like it
    for at in [*order[stay_N[order]].tolist(), *order[~stay_N[order]].tolist()]:
        alike = {words[at], *caption.near.get(words[at], ())} - {KEPT}
        hit = next(
            (
                (kept, c)
                for c, found in enumerate(covered)
                for kept in found.get(values[c][at], ())
                if words[kept] in alike
            ),
            None,
        )
        if hit is not None and not stay_N[at]:
            onto_N[at], why_N[at] = hit
            continue
        for c, found in enumerate(covered if cover_N[at] else ()):
            value = values[c][at]
            if value != KEPT:
                for like in (value, *pictures[c].near.get(value, ())):
                    found[like].append(at)
    return onto_N, why_N

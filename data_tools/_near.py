"""All pairs of 64-bit hashes that differ in few bits, found without comparing each with each.

Cut 64 bits into `distance + k` bands: two hashes that differ in at most `distance` bits agree in k bands at least. So
for each choice of k bands, only hashes that agree there are compared; k grows with the number of hashes.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from data_tools import _progress

BITS = 64
MANY = 100_000  # hashes that are worth a progress bar
CROWD = 64  # hashes of one key that are compared by shifting the whole list instead of all at once
BLOCK = 2048  # rows compared at once: 2048 x 2048 differences are 32 MB
COUNTS = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)  # numpy < 2 has no bitwise_count

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]  #: [P, 2], the smaller number first


def pairs_within(hash_N: Hashes, distance: int) -> Pairs:
    """Return the (i, j), i < j, whose hashes differ in at most `distance` bits, sorted."""
    found = [np.zeros((0, 2), np.int64)]
    choices = _choices(len(hash_N), distance)
    with _progress.bar(len(choices), doing="near pairs", unit="band", quiet=len(hash_N) < MANY) as bar:
        for mask in choices:
            order_N = np.argsort(hash_N & np.uint64(mask), kind="stable")
            found.extend(_agreeing(hash_N, hash_N[order_N] & np.uint64(mask), order_N, distance))
            bar.update()
    return np.unique(np.concatenate(found), axis=0)


def _choices(number: int, distance: int) -> list[int]:
    """Return, for each choice of bands, the mask of their bits."""
    chosen = next((k for k in (1, 2, 3) if BITS * k / (distance + k) >= np.log2(max(2, number))), 3)
    edges = np.linspace(0, BITS, distance + chosen + 1).round().astype(int).tolist()
    masks = [sum(1 << bit for bit in range(a, b)) for a, b in itertools.pairwise(edges)]
    return [sum(choice) for choice in itertools.combinations(masks, min(chosen, len(masks)))]


def _agreeing(hash_N: Hashes, key_N: Hashes, order_N: NDArray[np.int64], distance: int) -> list[Pairs]:
    """Compare the hashes that have the same key: `key_N` is sorted, and `order_N` says whose it is."""
    edges = np.flatnonzero(np.diff(key_N)) + 1
    bounds = np.concatenate([[0], edges, [len(key_N)]])
    large = np.flatnonzero(np.diff(bounds) > CROWD).tolist()
    found = [
        pairs for at in large for pairs in _compare(hash_N, np.sort(order_N[bounds[at] : bounds[at + 1]]), distance)
    ]
    alone_N = np.ones(len(key_N), bool)  # not in a large bucket
    for at in large:
        alone_N[bounds[at] : bounds[at + 1]] = False
    own_N, key_N = order_N[alone_N], key_N[alone_N]
    for shift in range(1, CROWD):
        same = np.flatnonzero(key_N[shift:] == key_N[:-shift])
        if not len(same):
            break
        left, right = own_N[same], own_N[same + shift]
        near = _bits(hash_N[left] ^ hash_N[right]) <= distance
        found.append(np.sort(np.stack([left[near], right[near]], 1), 1))
    return found


def _compare(hash_N: Hashes, rows: NDArray[np.int64], distance: int) -> list[Pairs]:
    found = []
    for a, b in itertools.combinations_with_replacement(range(0, len(rows), BLOCK), 2):
        left, right = rows[a : a + BLOCK], rows[b : b + BLOCK]
        near = _bits(hash_N[left][:, None] ^ hash_N[right][None]) <= distance
        if a == b:
            near = np.triu(near, 1)
        i, j = np.nonzero(near)
        if len(i):
            found.append(np.stack([left[i], right[j]], 1))
    return found


def _bits(value: Hashes) -> NDArray[np.uint8]:
    return COUNTS[value.view(np.uint16)].reshape(*value.shape, 4).sum(-1, dtype=np.uint8)

"""All pairs of 64-bit hashes that differ in few bits, found without comparing each with each.

Cut 64 bits into `distance + k` bands: two hashes that differ in at most `distance` bits agree in k bands at least. So
for each choice of k bands, only hashes that agree there are compared; k grows with the number of hashes.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

BITS = 64
BLOCK = 2048  # rows compared at once: 2048 x 2048 differences are 32 MB
COUNTS = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)  # numpy < 2 has no bitwise_count

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]  #: [P, 2], the smaller number first


def pairs_within(hash_N: Hashes, distance: int) -> Pairs:
    """Return the (i, j), i < j, whose hashes differ in at most `distance` bits, sorted."""
    found = [np.zeros((0, 2), np.int64)]
    for key_N in _keys(hash_N, distance):
        order_N = np.argsort(key_N, kind="stable")
        edges = np.flatnonzero(np.diff(key_N[order_N])) + 1
        for start, stop in itertools.pairwise([0, *edges.tolist(), len(order_N)]):
            if stop - start > 1:
                found.extend(_compare(hash_N, np.sort(order_N[start:stop]), distance))
    return np.unique(np.concatenate(found), axis=0)


def _keys(hash_N: Hashes, distance: int) -> "itertools.chain[Hashes]":
    """Yield, for each choice of bands, the bits of all hashes in those bands."""
    chosen = next((k for k in (1, 2, 3) if BITS * k / (distance + k) >= np.log2(max(2, len(hash_N)))), 3)
    edges = np.linspace(0, BITS, distance + chosen + 1).round().astype(int).tolist()
    masks = [sum(1 << bit for bit in range(a, b)) for a, b in itertools.pairwise(edges)]
    return itertools.chain(
        hash_N & np.uint64(sum(choice)) for choice in itertools.combinations(masks, min(chosen, len(masks)))
    )


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

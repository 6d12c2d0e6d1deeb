"""Several data sets in one run: which one each sample (or batch) comes from, as a pure function of its position.

1. A weight is a share of samples (of batches, where a whole batch comes from one source), whatever weights add up to.
2. The endless sequence is cut into blocks of M places. Each block holds the same count of each source, its share
   of the block by largest remainders, in an order permuted by (seed, block). So what came before a place is known
   without counting: whole blocks times the counts, and a part of one block.
3. A source's samples come in the order of its own endless sequence of epochs: a small one starts over while a large one
   is still in its first, and each sees every sample exactly once in each of its epochs.
4. The rows of a batch are sorted by (source, lane); rank r of W takes the r-th of W equal slices. So a rank may see
   one source only: which modules a step runs must not depend on it.

Example: weights 2 and 1 in blocks of 6 are 4 and 2. Block 0 may be 0 1 0 0 1 0. Place 8 is in block 1, behind
6 whole places: source 0 has been asked for 4 samples plus those in the first two places of block 1.

Letters: B = global batch, K = sources, M = places of a block, R = rows of one source, W = ranks.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from pretrain.config import ConfigError
from pretrain.data.order import Ints, Order, Place, check_divisible, permutation

Unit = Literal["sample", "batch"]
BLOCK: dict[Unit, int] = {"sample": 10_000, "batch": 100}  # a share is rounded to a ten-thousandth, or a hundredth
FEWEST_LANES = 4  # a rare source is mixed out of a few places, too


class Blend:
    """The order of several sources: `counts` samples (or whole batches, as `unit` says) of each in every block."""

    def __init__(self, orders: Sequence[Order], counts: Sequence[int], *, seed: int, unit: Unit = "sample") -> None:
        self.orders = list(orders)
        self.unit = unit
        self.seed = seed
        self.batch_size = self.orders[0].batch_size
        self.counts_K = np.array(counts, dtype=np.int64)
        self.block = sum(counts)
        self.samples = sum(order.samples for order in self.orders)
        self._blocks: OrderedDict[int, Ints] = OrderedDict()

    def rows(self, batch: int) -> list[Place]:
        """Return the rows of a global batch, sorted by source and lane: the ranks' slices, end to end."""
        return self.local(batch, 0, 1)

    def local(self, batch: int, rank: int, world: int) -> list[Place]:
        """Return the rows of a global batch that one rank owns.

        Raises:
            ConfigError: the batch cannot be cut into `world` equal parts.
        """
        check_divisible(self.batch_size, world)
        part = self.batch_size // world
        out: list[Place] = []
        passed = 0
        for order, (begin, end) in zip(self.orders, self.spans(batch)):
            low, high = max(rank * part - passed, 0), (rank + 1) * part - passed
            passed += end - begin
            if low < min(high, end - begin):
                out += order.places(order.span(begin, end)[low:high])
        return out

    def spans(self, batch: int) -> list[tuple[int, int]]:
        """Return each source's part of a global batch: [begin, end) of its endless sequence, perhaps empty."""
        if self.unit == "sample":
            begin_K, end_K = self.before(batch * self.batch_size), self.before((batch + 1) * self.batch_size)
        else:
            begin_K, end_K = self.before(batch) * self.batch_size, self.before(batch + 1) * self.batch_size
        return list(zip(begin_K.tolist(), end_K.tolist()))

    def before(self, place: int) -> Ints:
        """Return how many samples (or batches) of each source come before a place of the endless sequence."""
        block, offset = divmod(place, self.block)
        return block * self.counts_K + np.bincount(self._block(block)[:offset], minlength=len(self.orders))

    def neighbours(self, place: Place) -> Iterator[Place]:
        """Return who may stand in for a sample, in turn: the samples after it in the same epoch of its source."""
        return next(order for order in self.orders if order.source == place.source).neighbours(place)

    def _block(self, block: int) -> Ints:
        """Return the source of each place of a block."""
        if block not in self._blocks:
            source_M = np.repeat(np.arange(len(self.orders)), self.counts_K)
            self._blocks[block] = source_M[permutation(self.block, self.seed, "blend", block)]
            if len(self._blocks) > 2:  # where a batch begins and where it ends
                self._blocks.popitem(last=False)
        return self._blocks[block]


class Parts:
    """Several blends of which each gives a mini-batch to every step (OFA's two, Wang et al. 2022, arXiv:2202.03052)."""

    def __init__(self, blends: Sequence[Blend]) -> None:
        self.blends = list(blends)
        self.batch_size = sum(blend.batch_size for blend in blends)
        self.samples = sum(blend.samples for blend in blends)
        self.orders = [order for blend in blends for order in blend.orders]

    def rows(self, batch: int) -> list[Place]:
        """Return the rows of a global batch, mini-batch by mini-batch."""
        return [place for blend in self.blends for place in blend.rows(batch)]

    def minis(self, batch: int, rank: int, world: int) -> list[list[Place]]:
        """Return the rows of each mini-batch of a global batch that one rank owns."""
        return [blend.local(batch, rank, world) for blend in self.blends]

    def local(self, batch: int, rank: int, world: int) -> list[Place]:
        """Return the rows of a global batch that one rank owns, mini-batch by mini-batch."""
        return [place for mini in self.minis(batch, rank, world) for place in mini]

    def neighbours(self, place: Place) -> Iterator[Place]:
        """Return who may stand in for a sample, in turn: the samples after it in the same epoch of its source."""
        return next(order for order in self.orders if order.source == place.source).neighbours(place)


def sizes_of(weights: Sequence[float], batch_size: int, world: int) -> list[int]:
    """Return the rows of each mini-batch, in proportion to the weights of its sources.

    Raises:
        ConfigError: they are no whole numbers, or cannot be shared by the ranks.
    """
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    share = [weight * batch_size / sum(exact) for weight in exact]
    if any(rows.denominator > 1 or rows % world or not rows for rows in share):
        step = math.lcm(*((weight / sum(exact)).denominator for weight in exact)) * world
        would = " and ".join(f"{float(rows):g}" for rows in share)
        raise ConfigError(
            f"train.batch_size: the two parts of data.blend would have {would} of its {batch_size} rows; their weights "
            f"and {world} ranks want a multiple of {step}"
        )
    return [int(rows) for rows in share]


def lanes_of(count: int, *, block: int, lanes: int) -> int:
    """Return how many of the `lanes` a source of that share gets, so that all together shuffle no more shards."""
    return max(min(lanes, FEWEST_LANES), lanes * count // block)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Return `total` cut in proportion to the weights, by largest remainders; equal remainders favour the earlier.

    Raises:
        ConfigError: a share rounds to nothing.
    """
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]  # floats add up inexactly
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    if 0 in counts:
        number = counts.index(0)
        raise ConfigError(
            f"data.blend: source {number + 1} of {len(counts)} has a share of {float(exact[number] / total):.2g}, "
            f"less than one in {total:,}; raise its weight or leave it out"
        )
    return counts

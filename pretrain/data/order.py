"""Which sample comes when: a pure function of (seed, epoch, position). Nothing is read and nothing is remembered.

1. The shards of an epoch are permuted by (seed, epoch) and laid end to end: a sequence of N samples.
2. The sequence is cut into L lanes of equal length; the first N % L lanes hold one sample more.
3. Inside a lane, each block of `window` shards is shuffled by (seed, epoch, lane, block).
4. Position p of the epoch is sample p // L of lane p % L. As the longer lanes come first, p = 0 .. N-1 names every
   sample exactly once, whatever N and L are.
5. Batch b is the positions [bB, (b+1)B) of the endless sequence of epochs, so a batch may straddle two (or more).
6. Its rows are sorted by lane; rank r of W takes the r-th of W equal slices.

Several data sets in one run are a Blend (blend.py), which asks the Order of each for its next samples.

Example: shards of 4, 3 and 5 samples, L = 2. Sequence of the epoch: shard 2 (5), shard 0 (4), shard 1 (3). Lane 0
is its places 0-5 (shard 2 and the first sample of shard 0), lane 1 its places 6-11. A batch of 4
takes the next two of each.

Letters: B = global batch, L = lanes, N = samples of an epoch, R = rows asked for, S = shards, W = ranks.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.config import ConfigError
from pretrain.dist import hash64

Ints = NDArray[np.int64]


class Place(NamedTuple):
    """Where one sample of the endless sequence lies."""

    epoch: int
    position: int  #: within the epoch, 0 .. N-1
    shard: int  #: number of the shard in the list that was given
    member: int  #: number of the sample in its shard
    source: int = 0  #: number of the data set in data.blend


class _Epoch(NamedTuple):
    shards_S: Ints  #: the permuted shards
    starts_S1: Ints  #: where each begins in the sequence; the last entry is N


def permutation(count: int, *seed: int | str) -> Ints:
    """Return a permutation of `count` numbers that depends on nothing but `seed`.

    Sorting raw Philox words keeps the result equal across numpy releases, which Generator.permutation does not promise.
    """
    words = np.random.Philox(key=hash64(*seed)).random_raw(count)
    return np.argsort(words, kind="stable")


class Order:
    """The order of a data set whose shards hold `sizes` samples; `source` is its number among several.

    Raises:
        ConfigError: no samples, or a batch size or lane count below one.
    """

    def __init__(
        self, sizes: list[int], *, batch_size: int, lanes: int, seed: int, window: int = 4, source: int = 0
    ) -> None:
        if sum(sizes) < 1:
            raise ConfigError("data.shards: no samples in any shard; check the pattern or build the shards again")
        if min(batch_size, lanes, window) < 1:
            raise ConfigError(
                f"train.batch_size, data.lanes and data.window must be at least 1, got {batch_size}, {lanes}, {window}"
            )
        self.sizes_S = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes_S.sum())
        self.batch_size = batch_size
        self.lanes = min(lanes, self.samples)
        self.seed = seed
        self.window = window
        self.source = source
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()

    def rows(self, batch: int) -> list[Place]:
        """Return the rows of a global batch, sorted by lane: what the ranks' slices are, end to end."""
        return self.local(batch, 0, 1)

    def local(self, batch: int, rank: int, world: int) -> list[Place]:
        """Return the rows of a global batch that one rank owns.

        Raises:
            ConfigError: the batch cannot be cut into `world` equal parts.
        """
        check_divisible(self.batch_size, world)
        part = self.batch_size // world
        rows_B = self.span(batch * self.batch_size, (batch + 1) * self.batch_size)
        return self.places(rows_B[rank * part : (rank + 1) * part])

    def place(self, epoch: int, position: int) -> Place:
        """Return the sample at one position of an epoch; positions wrap around at its end."""
        return self.places(np.array([epoch * self.samples + position % self.samples]))[0]

    def neighbours(self, place: Place) -> Iterator[Place]:
        """Return who may stand in for a sample, in turn: all others of its epoch, from the next position on."""
        return (self.place(place.epoch, place.position + distance) for distance in range(1, self.samples))

    def span(self, begin: int, end: int) -> Ints:
        """Return the endless positions [begin, end), sorted by lane and, within a lane, by position."""
        endless_R = np.arange(begin, end, dtype=np.int64)
        return endless_R[np.argsort(endless_R % self.samples % self.lanes, kind="stable")]

    def places(self, endless_R: Ints) -> list[Place]:
        """Return the samples at endless positions."""
        epoch_R, position_R = np.divmod(endless_R, self.samples)
        lane_R = position_R % self.lanes
        group_R = epoch_R * self.lanes + lane_R
        shard_R, member_R = np.empty_like(endless_R), np.empty_like(endless_R)
        for group in np.unique(group_R):
            at = np.flatnonzero(group_R == group)
            epoch, lane = divmod(int(group), self.lanes)
            shard_R[at], member_R[at] = self._lane(epoch, lane, position_R[at] // self.lanes)
        columns = (epoch_R.tolist(), position_R.tolist(), shard_R.tolist(), member_R.tolist())
        return [Place(*row, self.source) for row in zip(*columns)]

    def _lane(self, epoch: int, lane: int, step_R: Ints) -> tuple[Ints, Ints]:
        """Return (shard, member) of the given samples of one lane."""
        shards_S, starts_S1 = self._epoch(epoch)
        length, longer = divmod(self.samples, self.lanes)
        begin = lane * length + min(lane, longer)
        end = begin + length + (lane < longer)
        first = int(np.searchsorted(starts_S1, begin, side="right")) - 1
        place_R = begin + step_R
        block_R = (np.searchsorted(starts_S1, place_R, side="right") - 1 - first) // self.window
        for block in np.unique(block_R):
            shard_low = first + int(block) * self.window
            low = max(begin, int(starts_S1[shard_low]))
            high = min(end, int(starts_S1[min(shard_low + self.window, len(shards_S))]))
            at = block_R == block
            place_R[at] = low + self._block(epoch, lane, int(block), high - low)[place_R[at] - low]
        index_R = np.searchsorted(starts_S1, place_R, side="right") - 1
        return shards_S[index_R], place_R - starts_S1[index_R]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards_S = permutation(len(self.sizes_S), self.seed, epoch, "shards")
            starts_S1 = np.concatenate([[0], np.cumsum(self.sizes_S[shards_S])])
            self._epochs[epoch] = _Epoch(shards_S, starts_S1)
            if len(self._epochs) > 4:  # a batch seldom meets more than two epochs
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _block(self, epoch: int, lane: int, block: int, count: int) -> Ints:
        key = (epoch, lane, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
        else:
            self._blocks[key] = permutation(count, self.seed, epoch, lane, block)
            if len(self._blocks) > 2 * self.lanes + 2:  # each lane's block, and the next one at a boundary
                self._blocks.popitem(last=False)
        return self._blocks[key]


def check_divisible(batch_size: int, world: int) -> None:
    """Refuse a global batch that the ranks cannot share equally.

    Raises:
        ConfigError: names the nearest batch sizes that work.
    """
    if batch_size % world:
        low = batch_size // world * world
        fits = f"{low} or {low + world}" if low else f"{world}"
        raise ConfigError(f"train.batch_size: {batch_size} rows cannot be shared by {world} ranks; use {fits}")

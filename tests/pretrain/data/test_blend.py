"""Blends: exact counts in every block, each source complete in each of its epochs, the same for any number of ranks."""

import random
import time
from collections import Counter

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.data.blend import BLOCK, Blend, lanes_of, shares
from pretrain.data.order import Order, Place


def blend(sizes: list[list[int]], weights: list[float], *, batch_size: int = 12, seed: int = 0, **options) -> Blend:
    lanes, window = options.pop("lanes", 4), options.pop("window", 2)
    orders = [
        Order(s, batch_size=batch_size, lanes=lanes, window=window, seed=seed + 100 * n, source=n)
        for n, s in enumerate(sizes)
    ]
    unit = options.get("unit", "sample")
    counts = shares(weights, options.pop("block", BLOCK[unit]))
    return Blend(orders, counts, seed=seed, unit=unit)


def some(rng: random.Random, unit: str) -> Blend:
    """Return a random blend whose batch, block, lanes and sizes have nothing to do with each other."""
    sizes = [[rng.randint(1, 9) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
    weights = [rng.choice([1.0, 2.0, 0.5, 3.7]) for _ in sizes]
    return blend(
        sizes,
        weights,
        batch_size=rng.randint(1, 8) * 12,
        seed=rng.randint(0, 9),
        unit=unit,
        block=rng.randint(40, 90),
        lanes=rng.randint(1, 9),
        window=rng.randint(1, 4),
    )


def walk(made: Blend, count: int) -> list[int]:
    """Return the source of each of the first places, found by counting one by one: what the closed form must equal."""
    before = np.stack([made.before(place) for place in range(count + 1)])
    steps = np.diff(before, axis=0)
    assert (steps.sum(1) == 1).all() and (steps >= 0).all()
    return steps.argmax(1).tolist()


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_counts_are_exact_in_every_block(unit):
    rng = random.Random(1)
    for _ in range(15):
        made = some(rng, unit)
        drawn = walk(made, 5 * made.block)
        for block in range(5):
            found = Counter(drawn[block * made.block : (block + 1) * made.block])
            assert [found[n] for n in range(len(made.orders))] == made.counts_K.tolist()
        assert len({tuple(drawn[n * made.block : (n + 1) * made.block]) for n in range(5)}) > 1 or len(made.orders) == 1


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_every_sample_once_in_each_epoch_of_its_source(unit):
    rng = random.Random(2)
    for _ in range(15):
        made = some(rng, unit)
        batches = (
            4 * made.block * (1 if unit == "batch" else 1 + made.samples // made.batch_size) // made.batch_size + 9
        )
        seen = Counter(p for b in range(batches) for p in made.rows(b))
        assert set(seen.values()) == {1}
        for number, order in enumerate(made.orders):
            of = sorted((p.epoch, p.position) for p in seen if p.source == number)
            assert of == [divmod(n, order.samples) for n in range(len(of))]  # no gap, no sample twice
            whole = [p for p in seen if p.source == number and p.epoch == 0]
            if len(of) >= order.samples:
                assert len({(p.shard, p.member) for p in whole}) == order.samples


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_ranks_share_the_same_global_batch(unit, world):
    rng = random.Random(3)
    for _ in range(10):
        made = some(rng, unit)
        for b in (0, 1, 7, 10**6):
            rows = made.rows(b)
            assert [p for r in range(world) for p in made.local(b, r, world)] == rows
            assert len(rows) == made.batch_size
            lanes = [(p.source, p.position % made.orders[p.source].lanes) for p in rows]
            assert lanes == sorted(lanes)
            if unit == "batch":
                assert len({p.source for p in rows}) == 1


def test_one_source_is_the_plain_order():
    order = Order([7, 5, 9], batch_size=8, lanes=4, seed=1)
    for unit in ("sample", "batch"):
        made = Blend([order], [30], seed=5, unit=unit)
        assert all(made.rows(b) == order.rows(b) for b in (0, 1, 2, 3, 999))


def test_neighbours_stay_in_source_and_epoch():
    made = blend([[3, 2], [4]], [1, 1])
    place = made.orders[1].place(2, 3)
    assert [(p.source, p.epoch, p.position) for p in made.neighbours(place)] == [(1, 2, 0), (1, 2, 1), (1, 2, 2)]


def test_answers_do_not_depend_on_what_was_asked_before():
    warm = blend([[13, 8], [21, 5]], [1, 2], block=30)
    batches = [warm.rows(b) for b in range(40)]
    for b in (39, 3, 17, 0):
        assert blend([[13, 8], [21, 5]], [1, 2], block=30).rows(b) == batches[b]


def test_shares_by_largest_remainder():
    assert shares([1, 1, 1], 100) == [34, 33, 33]
    assert shares([0.1, 0.2, 0.7], 10_000) == [1000, 2000, 7000]
    assert shares([5, 95], 10) == [1, 9]  # 0.5 and 9.5: the earlier one
    assert shares([10**9, 3 * 10**9], 100) == [25, 75]
    with pytest.raises(ConfigError, match=r"source 2 of 2 has a share of 0.001, less than one in 100; raise"):
        shares([0.999, 0.001], 100)


def test_sources_share_the_lanes():
    counts = shares([90, 9, 1], 10_000)
    assert [lanes_of(count, block=10_000, lanes=64) for count in counts] == [57, 5, 4]
    assert [lanes_of(count, block=10_000, lanes=2) for count in counts] == [2, 2, 2]
    assert lanes_of(100, block=100, lanes=64) == 64


def test_golden_blend():
    """Changing these numbers breaks the resume of every blend: it is an order break and belongs in the changelog."""
    by_sample = blend([[4, 3], [5]], [2, 1], batch_size=6, lanes=2, block=9)
    assert [tuple(p) for b in (0, 5) for p in by_sample.rows(b)] == GOLDEN_SAMPLES
    by_batch = blend([[4, 3], [5]], [2, 1], batch_size=6, lanes=2, unit="batch", block=6)
    assert [by_batch.rows(b)[0].source for b in range(12)] == GOLDEN_BATCHES
    whole = blend([[4, 3], [5]], [2, 1], batch_size=6)
    assert whole.counts_K.tolist() == [6667, 3333]
    assert whole.before(123_456).tolist() == GOLDEN_BEFORE


GOLDEN_SAMPLES = [  # epoch, position, shard, member, source
    (0, 0, 0, 0, 0),
    (0, 2, 0, 1, 0),
    (0, 4, 0, 2, 0),
    (0, 1, 1, 0, 0),
    (0, 3, 1, 1, 0),
    (0, 0, 0, 0, 1),
    (2, 6, 1, 2, 0),
    (3, 0, 1, 2, 0),
    (3, 2, 0, 0, 0),
    (2, 5, 0, 3, 0),
    (3, 1, 0, 1, 0),
    (2, 1, 0, 3, 1),
]
GOLDEN_BATCHES = [0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0]
GOLDEN_BEFORE = [82276, 41180]


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_resume_far_away_is_cheap(unit):
    """A thousand million samples in 100,000 shards of ten thousand: the first batch after a resume, anywhere."""
    sizes = [[10_000] * 30_000, [10_000] * 10_000, [10_000] * 40_000, [10_000] * 20_000]
    for position in (10**9 - 5, 10**9 + 123_456_789, 10**12):
        made = blend(sizes, [3, 2, 1, 2], batch_size=4096, lanes=16, window=4, unit=unit)
        begin = time.process_time()
        rows = made.rows(position // 4096)
        assert time.process_time() - begin < 1.0
        assert len(set(rows)) == 4096 and isinstance(rows[0], Place)

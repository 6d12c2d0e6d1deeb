"""The order of samples: complete, independent of ranks, equal on every machine."""

import random
import time
from collections import Counter

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.data.order import Order, Place, permutation


def epoch_of(order: Order, epoch: int) -> list[Place]:
    return [order.place(epoch, position) for position in range(order.samples)]


def test_every_sample_once_an_epoch():
    rng = random.Random(0)
    for _ in range(60):
        sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 7))]
        order = Order(
            sizes,
            batch_size=rng.randint(1, 17),
            lanes=rng.randint(1, 70),
            seed=rng.randint(0, 9),
            window=rng.randint(1, 5),
        )
        batches = -(-3 * order.samples // order.batch_size)  # the last ones straddle epochs
        places = [place for b in range(batches) for place in order.rows(b)]
        seen = Counter((p.epoch, p.shard, p.member) for p in places)
        for epoch in range(3):
            for shard, size in enumerate(sizes):
                assert all(seen[epoch, shard, member] == 1 for member in range(size)), (sizes, vars(order))


def test_batch_is_a_range_of_the_endless_sequence():
    order = Order([7, 5, 9], batch_size=8, lanes=4, seed=1)
    for b in range(9):
        got = sorted(p.epoch * order.samples + p.position for p in order.rows(b))
        assert got == list(range(b * 8, b * 8 + 8))


def test_batch_larger_than_the_data_set():
    order = Order([3, 2], batch_size=12, lanes=64, seed=0)
    assert order.lanes == 5
    assert Counter((p.shard, p.member) for p in order.rows(0)).most_common()[-1][1] == 2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world):
    order = Order([40, 31, 17], batch_size=16, lanes=6, seed=3)
    for b in (0, 4, 5, 11, 1000):
        assert [p for r in range(world) for p in order.local(b, r, world)] == order.rows(b)


def test_a_rank_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"train.batch_size: 10 rows .* 4 ranks; use 8 or 12"):
        Order([40], batch_size=10, lanes=2, seed=0).local(0, 0, 4)


def test_rows_are_sorted_by_lane():
    order = Order([50, 50], batch_size=32, lanes=8, seed=2)
    lanes = [p.position % 8 for p in order.rows(1)]
    assert lanes == sorted(lanes)


def test_shuffle_stays_inside_the_window():
    order = Order([10] * 12, batch_size=4, lanes=2, seed=5, window=2)
    for lane in range(2):
        shards = [order.place(0, step * 2 + lane).shard for step in range(60)]
        blocks = [set(shards[i : i + 20]) for i in range(0, 60, 20)]
        assert all(len(block) == 2 for block in blocks)
        assert len(set.union(*blocks)) == 6


def test_epochs_and_seeds_differ():
    order = Order([30, 30], batch_size=6, lanes=3, seed=0)
    other = Order([30, 30], batch_size=6, lanes=3, seed=1)
    first = [p[2:] for p in epoch_of(order, 0)]
    assert first != [p[2:] for p in epoch_of(order, 1)]
    assert first != [p[2:] for p in epoch_of(other, 0)]


def test_answers_do_not_depend_on_what_was_asked_before():
    sizes = [13, 8, 21, 5]
    warm = Order(sizes, batch_size=7, lanes=5, seed=4)
    batches = [warm.rows(b) for b in range(40)]
    for b in (39, 3, 17, 0):
        assert Order(sizes, batch_size=7, lanes=5, seed=4).rows(b) == batches[b]


def test_golden_order():
    """Changing these numbers breaks the resume of every run: it is an order break and belongs in the changelog."""
    assert permutation(8, 0, "golden").tolist() == GOLDEN_PERMUTATION
    order = Order([4, 3, 5], batch_size=4, lanes=2, seed=0)
    assert [tuple(p)[:4] for b in (0, 3) for p in order.rows(b)] == GOLDEN_ROWS


GOLDEN_PERMUTATION = [1, 4, 0, 6, 7, 2, 5, 3]
GOLDEN_ROWS = [
    (0, 0, 2, 0),
    (0, 2, 2, 1),
    (0, 1, 0, 1),
    (0, 3, 0, 2),
    (1, 0, 2, 2),
    (1, 2, 2, 4),
    (1, 1, 1, 1),
    (1, 3, 0, 1),
]


def test_resume_far_away_is_cheap():
    order = Order([10_000] * 1000, batch_size=4096, lanes=64, seed=0)
    begin = time.perf_counter()
    order.rows(10**6)
    assert time.perf_counter() - begin < 5.0  # 40 permutations of 40,000; replaying would take hours


def test_lanes_hold_the_samples_of_neighbouring_shards():
    order = Order([100] * 64, batch_size=64, lanes=16, seed=0, window=4)
    for b in (0, 20):
        shards = {p.shard for p in order.rows(b)}
        assert len(shards) <= 16 * 4
    lane = np.array([order.place(0, s * 16).shard for s in range(400)])
    assert len(set(lane.tolist())) <= 5


def test_no_samples():
    with pytest.raises(ConfigError, match="no samples"):
        Order([0, 0], batch_size=1, lanes=1, seed=0)

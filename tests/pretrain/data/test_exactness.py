"""Every sample once and every batch the same: over kills, other ranks and workers, bad samples, evaluation."""

import functools
import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from pretrain.batch import Batch
from pretrain.data import synthetic
from pretrain.data.excluded import STATE_BYTES, Sample
from pretrain.data.format import ShardWriter
from pretrain.data.loader import Loader
from pretrain.data.quarantine import Quarantine
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.dist import hash64
from tests.pretrain.data.killable import Killable, digests
from tests.pretrain.data.test_loader import BAD, make, pass_over, spoil, take

PICTURE = synthetic.sample(5, size=12, seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"a {label}" for label in synthetic.CLASSES], 560)


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Two sources, one of them with bad samples; both start over every few batches."""
    clean, mixed = (tmp_path_factory.mktemp(name) for name in ("clean", "mixed"))
    synthetic.write(clean, shards=3, samples=10, size=12)
    return [{"shards": f"{clean}/shapes-{{00000..00002}}.tar", "weight": 2}, {"shards": spoil(mixed, BAD), "weight": 1}]


def rows(folder: Path, counts: list[int], bad: frozenset[int] = frozenset()) -> list[str]:
    """Write shards of so many samples, all of the same picture, and return them; keys count on over the shards."""
    numbers = itertools.count()
    paths = []
    for shard, count in enumerate(counts):
        paths.append(str(folder / f"part-{shard:05d}.tar"))
        with ShardWriter(paths[-1]) as writer:
            for number in itertools.islice(numbers, count):
                writer.add(f"{number:06d}", {**PICTURE, **({"png": b"cut"} if number in bad else {})})
    return paths


def kill_often(folder: Path, make_loader, *, kills: int, steps: int, seed: int) -> None:
    """Kill loaders `kills` times on their way to step `steps`; compare every batch with the uninterrupted sequence."""
    whole = make_loader(rank=0, world=1, workers=0)
    whole.exclude(steps=range(9, 12), samples=[Sample(0, "shapes-00001.tar", "00000013")])
    (folder / "state.json").write_text(json.dumps(whole.state(0)))
    killable = Killable(make_loader, folder / "state.json")
    rng = random.Random(seed)
    shapes = list(itertools.product((1, 2, 4), (0, 2, 3)))  # ranks and workers: each pair comes
    rng.shuffle(shapes)
    for kill in range(kills):
        world, workers = shapes[kill % len(shapes)]
        batches = rng.randint(4, max(5, 2 * steps // kills))
        killable.live(world=world, workers=workers, batches=batches)
    assert len(killable.said) >= steps // 2 and sorted(killable.said) == list(range(len(killable.said)))
    expected = list(itertools.islice(digests([whole], 0), len(killable.said)))
    assert [killable.said[step] for step in range(len(expected))] == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.slow
def test_killed_loaders_go_on_exactly(blend, tokenizer, tmp_path):
    kill_often(tmp_path, functools.partial(make, [], tokenizer, blend=blend), kills=4, steps=24, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["sample", "batch"])
def test_loaders_killed_twenty_times_go_on_exactly(blend, tokenizer, tmp_path, by):
    made = functools.partial(make, [], tokenizer, blend=blend, blend_by=by)
    kill_often(tmp_path, made, kills=20, steps=200, seed=1)


def side_by_side(shards, tokenizer: Tokenizer, *, world: int, count: int, **options) -> list[list[Batch]]:
    """Return `count` global batches as the slices of `world` ranks."""
    loaders = [make(shards, tokenizer, rank=rank, world=world, **options) for rank in range(world)]
    return list(itertools.islice(map(list, zip(*(loader.iterate() for loader in loaders))), count))


@pytest.mark.parametrize(("world", "workers"), [(2, 2), (3, 1), (4, 0)])
def test_fewer_shards_than_readers_see_each_sample_once_an_epoch(tokenizer, tmp_path, world, workers):
    shards = rows(tmp_path, [11, 7, 13])  # 3 shards for 2 ranks x 2 workers
    steps = side_by_side(shards, tokenizer, world=world, workers=workers, count=8)  # 96 rows: 93 are three epochs
    drawn = Counter(draw for parts in steps for part in parts for draw in part.draw_B.tolist())
    for epoch in range(3):
        for number in range(31):
            shard = Path(shards[(number >= 11) + (number >= 18)]).name
            assert drawn[hash64(7, epoch, shard, f"{number:06d}")] == 1
    assert drawn.total() == 96


def test_one_bad_sample_in_a_thousand_changes_nothing_else(tokenizer, tmp_path):
    for name, bad in (("clean", frozenset()), ("spoiled", frozenset({613}))):
        (tmp_path / name).mkdir()
        rows(tmp_path / name, [400, 350, 250], bad)
    pattern = "part-{00000..00002}.tar"
    steps = 85  # of 12 rows: an epoch and 20 samples
    clean, spoiled = (
        side_by_side(str(tmp_path / name / pattern), tokenizer, world=2, workers=2, count=steps)
        for name in ("clean", "spoiled")
    )
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.01)
    order = make(str(tmp_path / "clean" / pattern), tokenizer).order
    replaced = []
    for step, (old, new) in enumerate(zip(clean, spoiled, strict=True)):
        keys = [[key for part in parts for key in part.keys] for parts in (old, new)]
        replaced += [(order.rows(step)[row], key) for row, (was, key) in enumerate(zip(*keys)) if was != key]
        for part in new:
            quarantine.add(part.bad)
    quarantine.sync(seen=12 * steps)
    assert [place.epoch for place, _ in replaced] == list(range(quarantine.count)) and quarantine.count in (1, 2)
    for place, key in replaced:
        after = order.place(place.epoch, place.position + 1)
        assert int(key) == sum([400, 350, 250][: after.shard]) + after.member
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["key"]) for line in lines] == [(str(p.epoch), "000613") for p, _ in replaced]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("counts", [[1], [2], [1, 1, 1], [5, 2], [4, 4, 4, 1]])
def test_evaluation_scores_each_sample_once(tokenizer, tmp_path, world, counts):
    total = sum(counts)
    for bad in (frozenset(), frozenset({total - 1}) if total > 1 else frozenset()):
        shards = rows(tmp_path, counts, bad)
        for batch_size in (1, 2, 5):
            ranks = [pass_over(shards, tokenizer, rank=r, world=world, batch_size=batch_size) for r in range(world)]
            assert len({tuple(map(len, batches)) for batches in ranks}) == 1  # collectives meet
            keys = [int(key) for batches in ranks for b in batches for key in b.keys[: len(b) - b.filler]]
            assert sorted(keys) == sorted(set(range(total)) - bad)
            assert sorted(int(line["key"]) for batches in ranks for b in batches for line in b.bad) == sorted(bad)


@pytest.mark.parametrize("position", [10**9, 10**12])
def test_resume_takes_no_longer_far_away(blend, tokenizer, position):
    def first(loader: Loader) -> list[Batch]:
        loader.restore(state)
        return take(loader, 1, start=int(state["batch"]))

    loader = make([], tokenizer, blend=blend)
    for start in range(0, 600, 2):
        loader.exclude(steps=[start])
    for number in range(50):
        loader.exclude(samples=[Sample(0, "shapes-00001.tar", f"{number:08d}")])
    state = json.loads(json.dumps(loader.state(position // 12)))
    assert len(json.dumps(state)) <= STATE_BYTES
    fresh = make([], tokenizer, blend=blend)
    begin = time.process_time()
    batch = first(fresh)[0]
    assert time.process_time() - begin < 1.0
    assert len(batch.keys) == 12


def test_workers_hand_over_shared_memory_and_stay(blend, tokenizer):
    loader = make([], tokenizer, blend=blend, workers=2)
    batch = take(loader, 1)[0]
    assert all(tensor.is_shared() for tensor in batch.tensors().values())  # not a copy through a pipe
    workers = [worker.pid for worker in loader._batches._iterator._workers]
    take(loader, 3, start=40)
    assert [worker.pid for worker in loader._batches._iterator._workers] == workers

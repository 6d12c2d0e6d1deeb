"""Blends through the loader: own readers, own epochs, replacements inside the source, one list of bad samples."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError, build
from pretrain.data import synthetic
from pretrain.data.excluded import Sample
from pretrain.data.loader import Config
from pretrain.data.quarantine import Quarantine, TooManyBad
from pretrain.data.tokenizer import Tokenizer, train
from tests.pretrain.data.test_loader import BAD, make, same, spoil, take


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"a {label}" for label in synthetic.CLASSES], 560)


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Three sources whose shards have the same names and keys: captions, labels, and one with bad samples."""
    folders = [tmp_path_factory.mktemp(name) for name in "abc"]
    for folder, shards in zip(folders, (3, 2)):
        synthetic.write(folder, shards=shards, samples=10, size=12, seed=shards)
    return [
        {"shards": f"{folders[0]}/shapes-{{00000..00002}}.tar", "weight": 3},
        {"shards": f"{folders[1]}/shapes-{{00000..00001}}.tar", "weight": 2, "reader": {"classify": {}}, "name": "b"},
        {"shards": spoil(folders[2], BAD), "weight": 1},
    ]


def test_each_source_has_its_share_and_its_reader(blend, tokenizer):
    loader = make([], tokenizer, blend=blend)
    assert loader.samples_per_epoch == 30 + 20 + 20
    batches = take(loader, 200)
    source_R = torch.cat([batch.source_B for batch in batches])
    share_K = torch.bincount(source_R) / len(source_R)
    assert share_K.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=0.03)
    labels_R = torch.cat([batch.target_B for batch in batches]) >= 0
    assert torch.equal(labels_R, source_R == 1)  # the classify reader's
    assert all(batch.source_B.equal(batch.source_B.sort().values) for batch in batches)


def test_whole_batches_of_one_source(blend, tokenizer):
    batches = take(make([], tokenizer, blend=blend, blend_by="batch"), 100)  # one block
    counts = Counter(tuple(batch.source_B.unique().tolist()) for batch in batches)
    assert counts == {(0,): 50, (1,): 33, (2,): 17}


@pytest.mark.parametrize("by", ["sample", "batch"])
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (3, 0), (4, 1)])
def test_ranks_workers_and_restarts_do_not_matter(blend, tokenizer, by, world, workers):
    expected = take(make([], tokenizer, blend=blend, blend_by=by), 9)
    loaders = [
        make([], tokenizer, blend=blend, blend_by=by, rank=r, world=world, workers=workers) for r in range(world)
    ]
    for start in (5, 0):
        parts = [take(loader, 4, start) for loader in loaders]
        for whole, *slices in zip(expected[start:], *parts):
            assert [key for part in slices for key in part.keys] == whole.keys
            assert [line for part in slices for line in part.bad] == whole.bad
            for name in ("image_NCHW", "source_B", "caption_B", "draw_B", "target_B"):
                assert torch.equal(torch.cat([part.tensors()[name] for part in slices]), whole.tensors()[name]), name


def test_bad_samples_are_replaced_inside_their_source(blend, tokenizer):
    batches = take(make([], tokenizer, blend=blend), 60)  # 720 rows, some 120 of source 2: six of its epochs
    for batch in batches:
        names = {Path(shard).name for shard, source in zip(batch.shards, batch.source_B.tolist()) if source == 2}
        assert names <= {"mixed.tar"}
    lines = [line for batch in batches for line in batch.bad]
    assert {line["source"] for line in lines} == {"2"}
    seen = Counter((line["epoch"], line["key"]) for line in lines)
    assert set(seen.values()) == {1} and {key for _, key in seen} == {f"{number:03d}" for number in BAD}
    assert {epoch for epoch, _ in seen} >= {"0", "1", "2", "3", "4"}  # the source's own epochs


def test_quarantine_counts_by_source(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.01)
    line = {"epoch": "0", "shard": "a.tar", "key": "x", "reason": "why"}
    quarantine.add([{**line, "source": "web"}, {**line, "source": "web", "key": "y"}, {**line, "source": "icons"}])
    with pytest.raises(TooManyBad, match=r"3 of 200 samples are unusable \(2 of source 'web', 1 of source 'icons'\), "):
        quarantine.sync(seen=200)
    assert quarantine.by_source == {"web": 2, "icons": 1}
    again = Quarantine(tmp_path / "q.jsonl", 0.5)
    again.sync(seen=200)
    assert again.by_source == quarantine.by_source


def test_equal_sources_are_not_in_step(blend, tokenizer):
    twin = [{**blend[0], "weight": 1, "name": name} for name in ("one", "two")]
    loader = make([], tokenizer, blend=twin)
    one, two = ([order.place(0, n)[2:4] for n in range(30)] for order in loader.order.orders)
    assert one != two and sorted(one) == sorted(two)
    draws = [d for batch in take(loader, 5) for d in batch.draw_B.tolist()]
    assert len(set(draws)) == len(draws)


def test_weights_left_out_are_numbers_of_samples(blend, tokenizer):
    plain = [{name: value for name, value in source.items() if name != "weight"} for source in blend]
    assert make([], tokenizer, blend=plain).order.counts_K.tolist() == [4286, 2857, 2857]


def test_fingerprint(blend, tokenizer):
    base = make([], tokenizer, blend=blend).fingerprint()
    assert base == make([], tokenizer, blend=blend, workers=1, rank=1, world=2).fingerprint()
    assert base == make([], tokenizer, blend=[{**s, "weight": 10 * s["weight"]} for s in blend]).fingerprint()
    assert base != make([], tokenizer, blend=blend, blend_by="batch").fingerprint()
    assert base != make([], tokenizer, blend=[{**blend[0], "weight": 4}, *blend[1:]]).fingerprint()
    assert base != make([], tokenizer, blend=[*blend[1:], blend[0]]).fingerprint()
    assert base["blend"]["counts"] == [5000, 3333, 1667]


def test_golden_keys(blend, tokenizer):
    """Changing these keys breaks the resume of every blend: it is an order break and belongs in the changelog."""
    assert [key.lstrip("0") for key in make([], tokenizer, blend=blend).keys(3)] == GOLDEN_KEYS


GOLDEN_KEYS = ["12", "10", "22", "19", "1", "28", "6", "9", "2", "7", "15", "3"]


@pytest.mark.parametrize("workers", [0, 2])
def test_rollback_leaves_out_batches_and_samples(blend, tokenizer, workers):
    clean = take(make([], tokenizer, blend=blend), 30)
    loader = make([], tokenizer, blend=blend, workers=workers)
    before = take(loader, 5)  # the workers are up
    gone = Sample(0, Path(clean[4].shards[0]).name, clean[4].keys[0])
    loader.exclude(steps=range(2, 4), samples=[gone])
    after = take(loader, 24)
    assert all(map(same, before, clean))
    assert loader.state(7)["excluded_batches"] == [[2, 4]]
    again = make([], tokenizer, blend=blend, workers=workers)
    again.restore(loader.state(7))
    assert all(map(same, take(again, 5, 7), after[7:]))
    changed = 0
    for got, plain in itertools.zip_longest(after, [*clean[:2], *clean[4:26]]):
        assert got.bad == plain.bad  # left out is not unusable
        for row, (key, old) in enumerate(zip(got.keys, plain.keys)):
            was = Sample(int(plain.source_B[row]), Path(plain.shards[row]).name, old)
            changed += was == gone
            assert (key != old) == (was == gone)
            assert int(got.source_B[row]) == was.source
    assert changed >= 3


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, r"give either shards \(one data set\) or blend"),
        ({"shards": "a.tar", "blend": [{"shards": "b.tar"}]}, "give either shards"),
        ({"blend": [{"shards": "a.tar", "weight": 1}, {"shards": "b.tar"}]}, "give a weight to each source or to none"),
        ({"blend": [{"shards": "a.tar", "weight": 0}]}, r"data: blend.0.weight: .*greater than 0 \(got 0\)"),
        ({"blend": [{"shards": "a.tar", "wieght": 1}]}, r"unknown key 'blend.0.wieght'. Did you mean 'weight'"),
        ({"blend": [{"shards": "a.tar"}, {"shards": "b.tar", "name": "0"}]}, "two sources are called '0'"),
        ({"blend": [{"shards": "a.tar"}], "blend_by": "step"}, "blend_by"),
    ],
)
def test_mistakes_in_the_config(data, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(Config, data, where="data")


def test_mistakes_in_a_source(blend, tokenizer):
    with pytest.raises(ConfigError, match=r"^data.blend, source 'b': data.reader: .* Did you mean 'caption'"):
        make([], tokenizer, blend=[blend[0], {**blend[1], "reader": {"captoin": {}}}])
    with pytest.raises(ConfigError, match=r"source 3 of 3 has a share of 2.5e-05, less than one in 10,000; raise"):
        make([], tokenizer, blend=[{**s, "weight": w} for s, w in zip(blend, (1.0, 3.0, 1e-4))])


@pytest.mark.parametrize("by", ["sample", "batch"])
def test_a_source_with_boxes_goes_with_one_that_crops_and_flips(blend, tokenizer, by):
    boxes = {"shards": blend[1]["shards"], "weight": 1, "reader": {"grounding": {}}}
    moved = {"scale": (0.3, 0.6), "flip": 0.5}
    with pytest.raises(ConfigError, match="give it an augment of its own"):
        make([], tokenizer, blend=[blend[0], boxes], augment=moved)
    loader = make([], tokenizer, blend=[blend[0], {**boxes, "augment": {}}], blend_by=by, augment=moved)
    alone = make([], tokenizer, blend=[blend[0], {**boxes, "augment": {}}], blend_by=by, augment={})
    differ = {0: [], 1: []}
    for one, other in zip(take(loader, 4), take(alone, 4)):
        assert one.keys == other.keys
        for source, left, right in zip(one.source_B.tolist(), one.image_NCHW, other.image_NCHW):
            differ[source].append(not torch.equal(left, right))
    assert all(differ[0]) and differ[1] and not any(differ[1])

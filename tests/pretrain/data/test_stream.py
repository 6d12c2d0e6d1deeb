"""Stream order: foreign shards over HTTP feed any ranks and workers, seeded, resumable, and what is broken is told."""

import gzip
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from pretrain import recipe
from pretrain.batch import Batch
from pretrain.config import ConfigError, build
from pretrain.data import format, stream, synthetic, tar_stream
from pretrain.data.compose import Composer
from pretrain.data.format import ShardError, ShardWriter
from pretrain.data.loader import Config, Loader
from pretrain.data.stream import StreamLoader
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.data.transforms import Augment, Transform
from tests.foreign_server import Server, serve

AUGMENT = Augment(scale=(0.5, 1.0), flip=0.5)
BATCH = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"a {label}" for label in synthetic.CLASSES], 560)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    synthetic.write(folder, shards=3, samples=10, size=12)
    return folder


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(tar_stream, "PAUSE", 0.01)


def make(shards, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1, kind=StreamLoader, **options):
    given = {"shards": shards, "workers": 0, "buffer": 16, "augment": AUGMENT, "order": "stream", **options}
    return kind(
        Config(**given),
        batch_size=BATCH,
        seed=7,
        transform=Transform(8),
        composer=Composer(tokenizer, context_length=16),
        rank=rank,
        world=world,
    )


def over_http(server: Server) -> str:
    return server.url + "/shapes-{00000..00002}.tar"


def take(loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader.iterate(), count))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        a.keys == b.keys
        and a.bad == b.bad
        and a.tensors().keys() == b.tensors().keys()
        and all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())
        for a, b in zip(one, other, strict=True)
    )


def counts(batches: list[Batch]) -> Counter[str]:
    return Counter(key for batch in batches for key in batch.keys)


def test_three_shards_feed_two_ranks_of_two_workers(folder, tokenizer):
    """More workers than shards: nobody hangs, all ranks give the same number of full batches, every sample comes."""
    with serve(folder) as server:
        first, again = (
            [take(make(over_http(server), tokenizer, rank=rank, world=2, workers=2), 40) for rank in range(2)]
            for _ in range(2)
        )
    assert all(same(a, b) for a, b in zip(first, again))
    assert {len(batch) for batches in first for batch in batches} == {BATCH // 2}
    seen = counts([batch for batches in first for batch in batches])
    assert sum(seen.values()) == 2 * 40 * BATCH // 2
    assert len(seen) == 30 and max(seen.values()) - min(seen.values()) <= 6, seen  # 10.7 each, if it were exact
    assert not any(batch.bad for batches in first for batch in batches)
    assert first[0][0].keys != first[1][0].keys


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_split_the_shards(folder, tokenizer, workers):
    """Two epochs' worth of batches give every sample about twice, whoever reads."""
    shards = str(folder / "shapes-{00000..00002}.tar")
    ranks = [take(make(shards, tokenizer, rank=r, world=2, workers=workers, buffer=4), 30) for r in range(2)]
    seen = counts([batch for batches in ranks for batch in batches])
    assert len(seen) == 30 and min(seen.values()) >= 4 and max(seen.values()) <= 12


def test_one_slot_sees_each_sample_once_an_epoch_but_for_the_buffer(folder, tokenizer):
    batches = take(make(str(folder / "shapes-{00000..00002}.tar"), tokenizer, buffer=5), 15)  # four epochs
    keys = [key for batch in batches for key in batch.keys]
    assert set(Counter(keys).values()) <= {3, 4, 5}
    assert all(len(set(keys[e * 30 : (e + 1) * 30])) >= 30 - 2 * 5 for e in range(4))
    shard_order = [[int(key) // 10 for key in keys[e * 30 : (e + 1) * 30 : 10]] for e in range(4)]
    assert len({tuple(order) for order in shard_order}) > 1, "epochs are shuffled anew"
    within = [int(key) for key in keys if int(key) < 10][:10]
    assert within != sorted(within), "the buffer shuffles"


def test_samples_are_those_of_the_exact_order(folder, tokenizer):
    """Same seed, epoch and key: the same draws, pixels and tokens."""
    shards = str(folder / "shapes-{00000..00002}.tar")
    exact = take(make(shards, tokenizer, kind=Loader, order="exact"), 3)  # 24 samples of epoch 0
    known = {key: (draw, image) for b in exact for key, draw, image in zip(b.keys, b.draw_B.tolist(), b.image_NCHW)}
    with serve(folder) as server:
        rows = [
            (key, draw, image)
            for b in take(make(over_http(server), tokenizer, buffer=1), 3)
            for key, draw, image in zip(b.keys, b.draw_B.tolist(), b.image_NCHW)
        ]
    assert [make(shards, tokenizer, decode=way)._samples.steps.exact for way in ("fast", "exact")] == [False, True]
    both = [row for row in rows if row[0] in known]
    assert len(both) > 12
    for key, draw, image in both:
        assert known[key][0] == draw and torch.equal(known[key][1], image)


def test_the_buffer_is_bounded_and_shared_by_workers(folder, tokenizer):
    loader = make(str(folder / "shapes-{00000..00002}.tar"), tokenizer, buffer=12)
    slot = stream._Slot(loader._samples, 0, 1)
    for _batch, _used in itertools.islice(slot.batches(12), 20):
        assert slot.read - slot.given <= 12
    assert slot.read - slot.given >= 11, "and it is used"


def test_resume_skips_what_was_used_up(folder, tokenizer):
    shards = str(folder / "shapes-{00000..00002}.tar")
    loader = make(shards, tokenizer, buffer=4)
    batches = loader.iterate()
    assert loader.state(0) == {"batch": 0, "shard": 0}
    states = []
    for done in range(1, 20):
        next(batches)
        states.append(loader.state(done))
    for done, state in enumerate(states, start=1):
        assert state == {"batch": done, "shard": done * BATCH // 10}  # ten samples a shard
    for state in (states[2], states[10]):
        one, other = (make(shards, tokenizer, buffer=4) for _ in range(2))
        one.restore(state)
        other.restore(state)
        assert one.state(state["batch"]) == state
        got = take(one, 4)
        assert same(got, take(other, 4))
        epoch, at = divmod(state["shard"], 3)
        shard = int(stream.permutation(3, 7, epoch, "shards")[at])
        assert int(got[0].keys[0]) // 10 == shard
    assert not same(got, take(make(shards, tokenizer, buffer=4), 4))


def test_the_position_does_not_know_ranks_or_workers(folder, tokenizer):
    shards = str(folder / "shapes-{00000..00002}.tar")
    for world, workers in ((1, 3), (2, 2), (4, 0)):
        loader = make(shards, tokenizer, world=world, workers=workers, buffer=4)
        take(loader, 60 * max(1, workers))
        exact = 60 * max(1, workers) * BATCH / 10
        slots = world * max(1, workers)
        assert abs(loader.state(60)["shard"] - exact) <= 2 * slots, (world, workers)


def test_a_drop_is_mended_by_opening_again(folder, tokenizer):
    with serve(folder) as server:
        expected = take(make(over_http(server), tokenizer), 12)
        name = "shapes-00001.tar"
        server.cut[name] = 3000
        server.asked.clear()
        server.cut_times[name] = 2
        assert same(take(make(over_http(server), tokenizer), 12), expected)
        assert server.asked[name] >= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_what_breaks_is_listed(folder, tokenizer, workers):
    with serve(folder) as server:
        server.cut["shapes-00001.tar"] = format.read_index(folder / "shapes-00001.tar")[4].members["png"][0] + 7
        server.status["shapes-00002.tar"] = 404
        batches = take(make(over_http(server), tokenizer, workers=workers, buffer=4), 20)
    bad = [line for batch in batches for line in batch.bad]
    reasons = {Path(line["shard"]).name: line["reason"] for line in bad}
    assert all(line["shard"].startswith("http://127.0.0.1") for line in bad)
    assert reasons.keys() == {"shapes-00001.tar", "shapes-00002.tar"}
    assert "reading stopped after byte" in reasons["shapes-00001.tar"]
    assert "cannot be read (the server answers 404" in reasons["shapes-00002.tar"]
    assert len({(line["epoch"], line["shard"]) for line in bad}) == len(bad), "once an epoch"
    assert {len(batch) for batch in batches} == {BATCH}
    seen = counts(batches)
    assert {key for key in seen if int(key) < 10} == {f"{n:08d}" for n in range(10)} and "00000016" not in seen


def spoil(path: Path, bad: set[int], samples: int = 12) -> str:
    with ShardWriter(path) as writer:
        for number in range(samples):
            members = synthetic.sample(number, size=12, seed=0)
            writer.add(f"{number:03d}", {**members, "png": b"<html>"} if number in bad else members)
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_listed(tokenizer, tmp_path, workers):
    shards = spoil(tmp_path / "mixed.tar", {2, 5})
    batches = take(make(shards, tokenizer, workers=workers, buffer=3), 10)
    bad = [line for batch in batches for line in batch.bad]
    assert {line["key"] for line in bad} == {"002", "005"} and all("decoded" in line["reason"] for line in bad)
    assert {len(batch) for batch in batches} == {BATCH} and not {"002", "005"} & counts(batches).keys()
    if not workers:
        assert len({(line["epoch"], line["key"]) for line in bad}) == len(bad)
        assert len(bad) >= 2 * (10 * BATCH // 10 - 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_is_usable_it_ends(tokenizer, folder, tmp_path, workers, monkeypatch):
    shards = spoil(tmp_path / "rotten.tar", set(range(12)))
    with pytest.raises(ShardError, match=r"^shard .*no usable sample at .* nor at the 999 samples before.*neighbours"):
        take(make(shards, tokenizer, workers=workers), 1)
    with serve(folder) as server, pytest.raises(ShardError, match=r"^shard http.*none.tar: cannot be read .*the 29"):
        take(make(f"{server.url}/none.tar", tokenizer, workers=workers), 1)


def test_gzip_and_commands(folder, tokenizer, tmp_path):
    plain = [str(folder / f"shapes-0000{n}.tar") for n in range(3)]
    packed = [tmp_path / f"shapes-0000{n}.tar" for n in range(3)]
    for source, target in zip(plain, packed):
        target.write_bytes(gzip.compress(Path(source).read_bytes()))
    expected = take(make(plain, tokenizer), 4)
    assert same(take(make([str(path) for path in packed], tokenizer), 4), expected)
    piped = make(f"pipe:cat {folder}/shapes-{{00000..00002}}.tar", tokenizer, allow_pipe=True, workers=1)
    assert [batch.keys for batch in take(piped, 4)] == [batch.keys for batch in expected]


@pytest.mark.parametrize(
    ("shards", "error", "words"),
    [
        ("pipe:curl http://x/a.tar", ConfigError, "set data.allow_pipe=true"),
        ("simplecache::http://x/a.tar", ConfigError, "chain of URLs"),
        ("nonsense://x/a.tar", ConfigError, "no scheme that can be read"),
        ([""], ConfigError, "names no shard"),
        (["http://x/{0..1}.tar", "http://x/1.tar"], ConfigError, "named twice"),
        ("nowhere/a.tar", ShardError, r"shard nowhere/a\.tar: no such file"),
    ],
)
def test_mistakes_are_one_sentence(tokenizer, shards, error, words):
    with pytest.raises(error, match=words):
        make(shards, tokenizer)


def test_ranks_must_share_the_batch(folder, tokenizer):
    with pytest.raises(ConfigError, match="cannot be shared by 3 ranks"):
        make(str(folder / "shapes-00000.tar"), tokenizer, world=3)


def test_fingerprint(folder, tokenizer):
    shards = str(folder / "shapes-{00000..00002}.tar")
    base = make(shards, tokenizer).fingerprint()
    assert base == make(shards, tokenizer, workers=2, rank=1, world=2).fingerprint()
    with serve(folder) as server:
        assert base == make(over_http(server), tokenizer).fingerprint()
    assert base != make(shards.replace("00002", "00001"), tokenizer).fingerprint()
    assert base["order"] == "stream"


def section(**train_keys) -> recipe.Recipe:
    tree = {
        "run": {"name": "x"},
        "data": {"shards": "http://127.0.0.1:9/{0..3}.tar", "order": "stream"},
        "objectives": {"contrastive": {}},
        "train": {"batch_size": 4, **train_keys},
    }
    return build(recipe.Recipe, tree)


def test_epochs_need_a_number_of_samples(tokenizer):
    with pytest.raises(ConfigError, match=r"give data\.samples"):
        recipe.build_loader(section(epochs=2), tokenizer)
    asked = section(epochs=2)
    asked.data.samples = 10
    loader = recipe.build_loader(asked, tokenizer)
    assert asked.train.total_steps(loader.samples_per_epoch) == 5
    for keys, steps in (({"steps": 3}, 3), ({"samples": 11}, 3)):
        assert (
            section(**keys).train.total_steps(recipe.build_loader(section(**keys), tokenizer).samples_per_epoch)
            == steps
        )

"""Global batches do not know ranks, workers or restarts; evaluation sees each sample once; bad samples are replaced."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from pretrain.batch import Batch
from pretrain.config import ConfigError, build
from pretrain.data import synthetic
from pretrain.data.compose import Composer
from pretrain.data.format import ShardError, ShardWriter
from pretrain.data.loader import Config, Loader, scan
from pretrain.data.picture import Picture
from pretrain.data.tokenizer import Tokenizer, train
from pretrain.data.transforms import Augment, Transform, generator

AUGMENT = Augment(scale=(0.5, 1.0), flip=0.5)
BATCH = 12  # 30 samples: every third batch straddles two epochs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"a {label}" for label in synthetic.CLASSES], 560)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    synthetic.write(folder, shards=3, samples=10, size=12)
    return str(folder / "shapes-{00000..00002}.tar")


def make(shards, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1, **options) -> Loader:
    config = Config(**{"shards": shards, "workers": 0, "lanes": 4, "augment": AUGMENT, **options})
    return Loader(
        config,
        batch_size=BATCH,
        seed=7,
        transform=Transform(8),
        composer=Composer(tokenizer, context_length=16),
        rank=rank,
        world=world,
    )


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.iterate(start), count))


def same(one: Batch, other: Batch) -> bool:
    a, b = one.tensors(), other.tensors()
    return (
        one.keys == other.keys
        and one.shards == other.shards
        and one.meta == other.meta
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


@pytest.fixture(scope="module")
def expected(shards, tokenizer) -> list[Batch]:
    return take(make(shards, tokenizer), 7)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_matter(shards, tokenizer, expected, workers):
    got = take(make(shards, tokenizer, workers=workers), 7)
    assert all(same(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 3])
def test_resume_anywhere(shards, tokenizer, expected, workers):
    loader = make(shards, tokenizer, workers=workers)
    for start in (3, 1, 5):  # the same workers serve another start
        assert all(same(*pair) for pair in zip(take(loader, 2, start), expected[start:]))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_not_matter(shards, tokenizer, expected, world):
    parts = [take(make(shards, tokenizer, rank=rank, world=world), 7) for rank in range(world)]
    for whole, *slices in zip(expected, *parts, strict=True):
        assert [key for part in slices for key in part.keys] == whole.keys
        for name in ("image_NCHW", "caption_B", "draw_B", "target_B"):
            got = torch.cat([part.tensors()[name] for part in slices])
            assert torch.equal(got, whole.tensors()[name]), name
        texts = [row[:n].tolist() for p in slices for row, n in zip(p.tokens_BT, p.valid_BT.sum(1))]
        assert texts == [row[:n].tolist() for row, n in zip(whole.tokens_BT, whole.valid_BT.sum(1))]


def test_pictures_travel_as_bytes_with_channels_last(shards, tokenizer, expected):
    for batch in (expected[0], take(make(shards, tokenizer, workers=1), 1)[0]):
        image_NCHW = batch.image_NCHW
        assert image_NCHW.dtype == torch.uint8 and image_NCHW.shape == (BATCH, 3, 8, 8)
        assert image_NCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_decode_is_what_the_transform_does(shards, tokenizer, decode):
    loader = make(shards, tokenizer, decode=decode)
    batch = take(loader, 1)[0]
    for number, place in enumerate(loader.order.rows(0)):
        record = loader.sources[place.source].store.read(place)
        rng = generator(record.draw)
        view = Transform(8).train(Picture(record.fields["png"]), AUGMENT, rng, exact=decode == "exact")
        assert torch.equal(batch.image_NCHW[number].permute(1, 2, 0), torch.tensor(view))


def test_a_moved_folder_gives_the_same_draws(shards, tokenizer, expected, tmp_path):
    for path in Path(shards).parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = take(make(str(tmp_path / "shapes-{00000..00002}.tar"), tokenizer), 1)[0]
    assert torch.equal(moved.image_NCHW, expected[0].image_NCHW)
    assert torch.equal(moved.draw_B, expected[0].draw_B)


def test_keys_and_epoch(shards, tokenizer, expected):
    loader = make(shards, tokenizer)
    assert loader.samples_per_epoch == 30
    assert [loader.keys(b) for b in range(7)] == [batch.keys for batch in expected]
    seen = Counter(key for batch in expected[:5] for key in batch.keys)  # 60 rows, two epochs
    assert set(seen.values()) == {2} and len(seen) == 30


def test_epochs_draw_anew(shards, tokenizer, expected):
    first, second = ({k: d for b in half for k, d in zip(b.keys, b.draw_B.tolist())} for half in
                     ([expected[0], expected[1]], [expected[3], expected[4]]))  # fmt: skip
    assert all(first[key] != second[key] for key in first.keys() & second.keys())


def test_fingerprint(shards, tokenizer):
    base = make(shards, tokenizer).fingerprint()
    assert base == make(shards, tokenizer, workers=2, rank=1, world=2).fingerprint()
    assert base != make(shards, tokenizer, lanes=5).fingerprint()
    assert base != make(shards.replace("00002", "00001"), tokenizer).fingerprint()


def test_text_is_trimmed(expected):
    for batch in expected:
        assert int(batch.valid_BT.sum(1).max()) == batch.tokens_BT.shape[1]
        assert (batch.labels_BT[~batch.valid_BT] == -100).all() and (batch.labels_BT[:, 0] == -100).all()
        counts = batch.labels_BT != -100
        assert torch.equal(batch.labels_BT[counts], batch.tokens_BT[counts])
        assert (batch.blocks_BT == 1).all()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 7, 50])
def test_evaluation_sees_each_sample_once(shards, tokenizer, world, batch_size):
    ranks = [pass_over(shards, tokenizer, rank=r, world=world, batch_size=batch_size) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for step in zip(*ranks):
        assert len({len(batch) for batch in step}) == 1
    keys = [key for batches in ranks for b in batches for key in b.keys[: len(b) - b.filler]]
    assert len(keys) == 30 and len(set(keys)) == 30


def pass_over(shards, tokenizer: Tokenizer, *, batch_size: int = 7, **options) -> list[Batch]:
    composer = Composer(tokenizer, context_length=16)
    more = {"reader": {"caption": {}}, "transform": Transform(8), "composer": composer, **options}
    return list(scan(shards, batch_size=batch_size, **more))


def test_evaluation_with_workers(shards, tokenizer):
    one, two = (pass_over(shards, tokenizer, workers=workers) for workers in (0, 2))
    assert all(same(*pair) for pair in zip(one, two, strict=True))


def test_passes_with_augmentation_draw_by_epoch_and_seed(shards, tokenizer):
    def views(**options) -> torch.Tensor:
        return torch.cat([batch.image_NCHW for batch in pass_over(shards, tokenizer, **options)])

    flip = Augment(scale=(0.3, 1.0), flip=0.5)
    plain, first, second = views(), views(augment=flip), views(augment=flip, epoch=1)
    assert plain.shape == first.shape == second.shape
    assert not torch.equal(plain, first) and not torch.equal(first, second)
    assert not torch.equal(first, views(augment=flip, seed=1))
    assert torch.equal(second, views(augment=flip, epoch=1, batch_size=4, workers=1))


def spoil(folder: Path, bad: dict[int, dict[str, bytes]], samples: int = 20) -> str:
    with ShardWriter(folder / "mixed.tar") as writer:
        for number in range(samples):
            members = synthetic.sample(number, size=12, seed=0)
            writer.add(f"{number:03d}", bad.get(number, members))
    return str(folder / "mixed.tar")


GOOD = synthetic.sample(0, size=12, seed=0)
BAD = {
    3: {**GOOD, "png": b"<html>404"},
    4: {**GOOD, "txt": b"caf\xe9"},
    8: {**GOOD, "txt": b"  \n"},
    9: {"txt": b"no picture"},
    10: {"png": GOOD["png"]},
    11: {**GOOD, "json": b"{oops"},
}
REASONS = {"003": "decoded", "004": "UTF-8", "008": "empty", "009": "no image", "010": "no caption", "011": "JSON"}


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_bad_samples_are_replaced_alike_everywhere(tokenizer, tmp_path, workers, world):
    shards = spoil(tmp_path, BAD)
    whole = take(make(shards, tokenizer), 5)  # 60 rows, three epochs
    parts = [take(make(shards, tokenizer, rank=r, world=world, workers=workers), 5) for r in range(world)]
    for batch, *slices in zip(whole, *parts, strict=True):
        assert [key for part in slices for key in part.keys] == batch.keys
        assert torch.equal(torch.cat([part.image_NCHW for part in slices]), batch.image_NCHW)
        assert [line for part in slices for line in part.bad] == batch.bad
        assert not set(batch.keys) & set(REASONS)
    lines = [line for batch in whole for line in batch.bad]
    assert Counter((line["epoch"], line["key"]) for line in lines) == Counter(
        (str(epoch), key) for epoch in range(3) for key in REASONS
    )
    assert all(REASONS[line["key"]] in line["reason"] and line["shard"] == shards for line in lines)


def test_bad_samples_are_left_out_of_evaluation(tokenizer, tmp_path):
    batches = pass_over(spoil(tmp_path, BAD), tokenizer, batch_size=2)  # 8 + 9 and 10 + 11 leave nothing
    keys = [key for b in batches for key in b.keys[: len(b) - b.filler]]
    assert len(keys) == 14 and not set(keys) & set(REASONS)
    assert sorted(line["key"] for b in batches for line in b.bad) == sorted(REASONS)
    assert {len(b) for b in batches} == {2}


def test_without_copies_a_batch_may_be_empty(tokenizer, tmp_path):
    batches = pass_over(spoil(tmp_path, BAD), tokenizer, batch_size=2, filled=False)
    assert [key for batch in batches for key in batch.keys] == [f"{n:03d}" for n in range(20) if n not in BAD]
    assert {batch.filler for batch in batches} == {0} and [len(batch) for batch in batches].count(0) == 2
    assert sorted(line["key"] for b in batches for line in b.bad) == sorted(REASONS)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_usable_sample(tokenizer, tmp_path, workers):
    shards = spoil(tmp_path, {number: {"txt": b"x"} for number in range(20)})
    with pytest.raises(ShardError, match=r"^shard .*no usable sample .*no image member.*data_tools validate"):
        take(make(shards, tokenizer, workers=workers), 1)
    with pytest.raises(ShardError, match=r"^shard .*none of the 20 samples is usable"):
        pass_over(shards, tokenizer, workers=workers)


def test_a_disk_error_is_no_bad_sample(shards, tokenizer, monkeypatch):
    loader = make(shards, tokenizer)
    monkeypatch.setattr("pretrain.data.shards.read_members", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        take(loader, 1)


def test_mistakes_in_the_config(shards, tokenizer):
    with pytest.raises(ConfigError, match="cannot be shared by 5 ranks; use 10 or 15"):
        make(shards, tokenizer, world=5)
    with pytest.raises(ConfigError, match=r"has no 'captoin'. Did you mean 'caption'"):
        make(shards, tokenizer, reader={"captoin": {}})
    with pytest.raises(ConfigError, match=r"data.reader.caption: unknown key 'txt'"):
        make(shards, tokenizer, reader={"caption": {"txt": 1}})
    with pytest.raises(ConfigError, match="unknown key 'lane'"):
        build(Config, {"shards": "x.tar", "lane": 3})


def outlive_the_notice(shards: str) -> None:
    """Signal both workers as a scheduler does; they go on. Then end them as their rank does."""
    tokenizer = train(["a cat"], 520)
    plain = make(shards, tokenizer, workers=0).iterate(0)
    expected = [next(plain) for _ in range(3)]
    loader = make(shards, tokenizer, workers=2)
    batches = loader.iterate(0)
    next(batches), next(batches)  # one of each worker: both are up
    workers = loader._batches._iterator._workers
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(w.pid) for w in workers)], check=True)
    time.sleep(0.2)
    assert same(next(batches), expected[2])
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:  # but the rank's own word ends them
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def test_workers_outlive_the_notice_to_the_group(shards):
    """In a process of its own, as a rank is: here, threads that other tests have left take the signal instead."""
    code = EXIT.partition("loader =")[0].format(folder=str(Path(__file__).parent)) + f"t.outlive_the_notice({shards!r})"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


EXIT = """
import sys
sys.path.insert(0, {folder!r})
import test_loader as t
from pretrain.data import synthetic, tokenizer
loader = t.make({shards!r}, t.train(["a cat"], 520), workers=2)
batches = loader.iterate()
next(batches)
"""


def test_a_process_that_still_holds_workers_can_exit(shards):
    code = EXIT.format(folder=str(Path(__file__).parent), shards=shards)
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False)
    assert done.returncode == 0


ORPHANS = """
import os, sys, time
sys.path.insert(0, {folder!r})
import test_loader as t
from pretrain.data import loader
loader.LOOK_SECONDS = 0.1
start = loader.start_worker
loader.start_worker = lambda worker: (time.sleep(0.5), start(worker))
endless = iter(t.make({shards!r}, t.train(["a cat"], 520), workers=2)._batches)
print(*(worker.pid for worker in endless._workers), flush=True)
os.kill(os.getpid(), 9)
"""


def test_workers_end_with_a_rank_that_is_killed_while_they_start(shards):
    code = ORPHANS.format(folder=str(Path(__file__).parent), shards=shards)
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, stdout=subprocess.PIPE) as run:
        said, _ = run.communicate(timeout=60)  # ends when the last of them has closed it
    assert run.returncode == -9 and len(said.split()) == 2

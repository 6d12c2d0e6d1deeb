"""Shards by name: braces, counts, first-use indexes, and every way a shard can be wrong."""

import io
import os
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.data import format, index, synthetic
from pretrain.data.order import Order
from pretrain.data.shards import Store


def foreign(folder: Path, *, samples: int = 5) -> Path:
    """A tar as another tool writes it: no index, no manifest."""
    path = folder / "other.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for extension, data in {"txt": b"a cat", "png": b"x" * 600}.items():
                info = tarfile.TarInfo(f"./pics/{number:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_braces_and_lists(tmp_path):
    paths = synthetic.write(tmp_path, shards=3, samples=4, size=8)
    catalog = index.resolve([str(tmp_path / "shapes-{00000..00001}.tar"), str(paths[2])])
    assert catalog.paths == paths and catalog.sizes == [4, 4, 4]


def test_nothing_or_twice():
    with pytest.raises(ConfigError, match="names no shard"):
        index.expand([])
    with pytest.raises(ConfigError, match="named twice"):
        index.expand(["a{0..1}.tar", "a1.tar"])


def test_foreign_shard_is_indexed_on_first_use(tmp_path):
    path = foreign(tmp_path)
    assert index.resolve(str(path)).sizes == [5]
    assert len(format.read_index(path)) == 5
    assert not list(tmp_path.glob(".*.part"))


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = foreign(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format, "write_atomic", full)
    catalog = index.resolve(str(path))
    assert catalog.sizes == [5] and not format.index_path(path).exists()
    assert catalog.index(0).count(b"\n") == 6


def count(path: str) -> list[int]:
    return index.resolve(path).sizes


def test_many_processes_at_once(tmp_path):
    path = foreign(tmp_path, samples=200)
    with get_context("fork").Pool(4) as pool:
        assert pool.map(count, [str(path)] * 8) == [[200]] * 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.idx", "other.tar"]


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 512 * 6])  # within the third member


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[512 * 5 : 512 * 6] = b"\xff" * 512  # where the third member's header begins
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"\0" * 10240)


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing, "cannot be read .*check data.shards"),
        (damage_garbage, "not a readable tar .*again, or leave it out"),
        (damage_cut, "not a readable tar .*stopped at byte"),
        (damage_header, "header at byte 2560 .*damaged"),
        (damage_empty, "holds no samples"),
        (damage_folder, "is a folder; name its tars"),
    ],
)
def test_bad_shards_say_what_to_do(tmp_path, damage, words):
    path = foreign(tmp_path)
    damage(path)
    with pytest.raises(format.ShardError, match=words) as caught:
        index.resolve(str(path))
    assert str(path) in str(caught.value)


def test_shard_cut_off_after_it_was_listed(tmp_path):
    [path] = synthetic.write(tmp_path, shards=1, samples=4, size=8)
    damage_cut(path)
    with pytest.raises(format.ShardError, match=r"dataset.json says .* cut off or changed"):
        index.resolve(str(path))
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(format.ShardError, match="made for a tar of"):
        index.resolve(str(path))


def test_index_that_contradicts_the_manifest(tmp_path):
    [path] = synthetic.write(tmp_path, shards=1, samples=4, size=8)
    format.write_index(path, format.read_index(path)[:3])
    catalog = index.resolve(str(path))  # reads no index: dataset.json has the count
    with pytest.raises(format.ShardError, match=r"index has 3 samples, dataset\.json says 4"):
        catalog.index(0)


def test_broken_index(tmp_path):
    [path] = synthetic.write(tmp_path, shards=1, samples=4, size=8)
    format.index_path(path).write_bytes(b"junk\n")
    with pytest.raises(format.ShardError, match="data_tools index"):
        index.resolve(str(path)).index(0)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(format.ShardError, match="data_tools index"):
        index.resolve(str(path))


def test_index_that_is_missing_is_made_when_it_is_needed(tmp_path):
    [path] = synthetic.write(tmp_path, shards=1, samples=4, size=8)
    made = format.index_path(path).read_bytes()
    format.index_path(path).unlink()
    catalog = index.resolve(str(path))
    assert catalog.sizes == [4] and not format.index_path(path).exists()
    assert catalog.index(0) == made == format.index_path(path).read_bytes()


def many(folder: Path, count: int) -> str:
    """Link one shard and its index under `count` names, with a dataset.json."""
    [path] = synthetic.write(folder, shards=1, samples=4, size=8)
    for number in range(count):
        os.link(path, folder / f"m-{number:05d}.tar")
        os.link(format.index_path(path), folder / f"m-{number:05d}.idx")
    size = path.stat().st_size
    format.write_manifest(folder, {f"m-{n:05d}.tar": (4, size) for n in range(count)}, {})
    return f"{folder}/m-{{00000..{count - 1:05d}}}.tar"


def test_ten_thousand_shards_start_at_once(tmp_path):
    shards = many(tmp_path, 10_000)
    before = time.process_time()  # of this process alone: others may be busy
    catalog = index.resolve(shards)
    order = Order(catalog.sizes, batch_size=256, lanes=64, seed=0)
    records = list(Store(catalog, seed=0)(order.rows(0)))
    spent = time.process_time() - before
    print(f"10,000 shards: {spent:.3f} s of CPU time to the first batch of {len(records)} records")
    assert len(records) == 256 and sum(catalog.sizes) == 40_000
    assert spent < 1


def test_several_processes_read_headers(tmp_path, monkeypatch):
    """Without dataset.json, foreign shards are indexed side by side; indexes are the same as one by one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    paths = synthetic.write(tmp_path, shards=5, samples=4, size=8)
    made = [format.index_path(path).read_bytes() for path in paths]
    for path in (*map(format.index_path, paths), tmp_path / "dataset.json"):
        path.unlink()
    catalog = index.resolve([str(path) for path in paths])
    assert catalog.sizes == [4] * 5
    assert [format.index_path(path).read_bytes() for path in paths] == made
    damage_garbage(paths[3])
    format.index_path(paths[3]).unlink()
    format.index_path(paths[2]).unlink()
    with pytest.raises(format.ShardError, match="not a readable tar"):
        index.resolve([str(path) for path in paths])

"""The treaty: what is written is read, whatever the names."""

import io
import tarfile

import pytest

from pretrain.data import format


def test_writer_index_and_scan_agree(tmp_path):
    path = tmp_path / "a.tar"
    with format.ShardWriter(path) as writer:
        writer.add("x/1", {"txt": b"one", "seg.png": b"p" * 700})
        writer.add("2", {"txt": b""})
    assert format.read_index(path) == format.scan(path) == writer.entries
    with open(path, "rb") as file:
        assert format.read_members(file, writer.entries[0]) == {"txt": b"one", "seg.png": b"p" * 700}


def test_odd_names_survive_the_index(tmp_path):
    path = tmp_path / "odd.tar"
    names = ["tab\there.t\txt", "line\u2028sep.txt", 'quote".j"s:on', "ünï.TXT", "back\\slash.t\\x"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    entries = format.scan(path)
    format.write_index(path, entries)
    assert format.read_index(path) == entries and len(entries) == len(names)


def test_same_samples_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        with format.ShardWriter(tmp_path / name) as writer:
            writer.add("1", {"txt": b"one"})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_failure_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError), format.ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("1", {"txt": b"one"})
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["", "a.b", "/etc/x", "../x"])
def test_bad_keys_are_refused(tmp_path, key):
    with format.ShardWriter(tmp_path / "a.tar") as writer:
        with pytest.raises(format.ShardError, match="relative name without dots"):
            writer.add(key, {"txt": b"x"})
        writer.add("ok", {"txt": b"x"})
        with pytest.raises(format.ShardError, match="given twice"):
            writer.add("ok", {"txt": b"x"})


def test_duplicate_member_in_a_foreign_tar(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(format.ShardError, match="two members"):
        format.scan(path)

"""Tars read forward: the same samples as by index, and every way a body can end is told apart."""

import gzip
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.data import format, names, remote, synthetic, tar_stream
from pretrain.data.format import ShardError
from pretrain.data.remote import Access
from pretrain.data.transports import base
from tests.foreign_server import serve


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("shapes"), shards=1, samples=6, size=12)[0]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(tar_stream, "PAUSE", 0.01)


def samples(url: str | Path, **options: float) -> Iterator[tar_stream.Sample]:
    """Return the samples of what a config would name so."""
    [source] = names.expand(str(url), Access(allow_pipe=True))
    return tar_stream.samples(source, **options)


def read(url: str | Path) -> tuple[list[str], tar_stream.Broken | None]:
    """Return the keys that a shard gives, and how it ended."""
    keys = []
    try:
        for sample in samples(url):
            keys.append(sample.key)
    except tar_stream.Broken as error:
        return keys, error
    return keys, None


def indexed(shard: Path) -> dict[str, dict[str, bytes]]:
    with open(shard, "rb") as file:
        return {entry.key: format.read_members(file, entry) for entry in format.read_index(shard)}


def test_the_same_samples_as_by_index(shard, tmp_path):
    packed = tmp_path / "shapes.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with serve(shard.parent) as server:
        for url in (shard, packed, f"pipe:cat {shard}", f"{server.url}/{shard.name}", f"file://{shard}"):
            assert {s.key: s.fields for s in samples(url)} == indexed(shard), url
        assert server.asked[shard.name] == 1


def test_long_names_folders_and_hidden_members(tmp_path):
    """What GNU and pax headers, folders, links and macOS leave in a tar."""
    names = ["a" * 150 + "/café.txt", "./b/c.d.txt", "._b.txt", "noextension"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo("folder"))
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 600
                tar.addfile(info, io.BytesIO(b"x" * 600))
        expected = {entry.key: {ext: b"x" * 600 for ext in entry.members} for entry in format.scan(path)}
        assert len(expected) == 2 and {s.key: s.fields for s in samples(path)} == expected
        with tarfile.open(path, "a", format=form) as tar:
            link = tarfile.TarInfo("link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "../../secret"
            tar.addfile(link)
        *plain, linked = samples(path)
        assert {s.key: s.fields for s in plain} == expected
        assert linked.key == "link" and "no plain file" in linked.reason


def test_a_body_cut_at_any_byte_is_told(shard, tmp_path):
    """No cut gives a short shard without a word, and no sample before it is lost but the one that it may belong to."""
    whole, path = shard.read_bytes(), tmp_path / "cut.tar"
    ends = [max(at + size for at, size in entry.members.values()) for entry in format.read_index(shard)]
    end = -(-ends[-1] // 512) * 512
    for length in [*range(0, end, 256), *(e for e in ends), end]:
        path.write_bytes(whole[:length])
        keys, broken = read(path)
        assert broken is not None, length
        assert keys == list(indexed(shard))[: len(keys)] and len(keys) >= sum(e <= length for e in ends) - 1, length
    assert "mark that ends an archive is missing" in str(broken)
    path.write_bytes(whole[: end + 512])
    assert read(path) == (list(indexed(shard)), None)


def damage(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_damage_is_told(shard, tmp_path):
    whole, path = shard.read_bytes(), tmp_path / "x.tar"
    at = format.read_index(shard)[3].members["png"][0] - 512
    keys, broken = read(damage(path, whole[:at] + b"\xff" * 512 + whole[at + 512 :]))
    assert len(keys) == 2 and f"header that ends at byte {at + 512} is damaged" in str(broken)
    assert broken.key == "00000002"
    for data, words in (
        (os.urandom(5000), "not a readable tar"),
        (b"", "empty file"),
        (b"\0" * 10240, "holds no samples"),
        (gzip.compress(whole)[:-400], "gzip is cut off or damaged"),
    ):
        keys, broken = read(damage(path, data))
        assert broken is not None and words in str(broken)
    assert "cannot be opened (No such file" in str(read(tmp_path / "none.tar")[1])
    assert "cannot be opened (Is a directory" in str(read(tmp_path)[1])


def test_a_member_named_twice_spoils_its_sample(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name in ("a.txt", "a.TXT", "b.txt"):
            tar.addfile(tarfile.TarInfo(name))
    found = list(samples(tmp_path / "twice.tar"))
    assert [(s.key, bool(s.reason)) for s in found] == [("a", True), ("b", False)]


def test_commands_that_fail_are_told(shard):
    keys, broken = read(f"pipe:cat {shard}; exit 4")
    assert len(keys) == 5 and "exit code 4" in str(broken) and broken.key == "00000005"
    keys, broken = read(f"pipe:head -c 3000 {shard}")
    assert "cut off at byte 3000" in str(broken)
    assert "exit code 3" in str(read("pipe:exit 3")[1])
    endless = samples(f"pipe:cat {shard} /dev/zero")
    assert len(list(endless)) == 6  # the command is ended, not waited for


def test_a_server_that_stalls_is_told(shard, monkeypatch):
    monkeypatch.setattr(base, "STALL_SECONDS", 0.3)
    with serve(shard.parent) as server:
        server.cut[shard.name] = 4000
        server.stall.add(shard.name)
        keys, broken = read(f"{server.url}/{shard.name}")
        assert "stalled for 0.3 s" in str(broken) and keys in ([], ["00000000"])


def test_a_server_that_breaks_off_is_told(shard):
    with serve(shard.parent) as server:
        url = f"{server.url}/{shard.name}"
        server.cut[shard.name] = format.read_index(shard)[2].members["png"][0] + 100
        keys, broken = read(url)
        assert keys == ["00000000", "00000001"] and f"reading stopped after byte {server.cut[shard.name]}" in str(
            broken
        )
        server.cut_times[shard.name] = server.asked[shard.name] + 2
        assert read(url) == (list(indexed(shard)), None), "the third attempt goes on where the first two broke"
        del server.cut_times[shard.name]
        server.no_length.add(shard.name)
        keys, broken = read(url)
        assert keys == ["00000000", "00000001"] and "cut off at byte" in str(broken) and broken.key == "00000002"
        server.status = {"forbidden.tar": 403}
        for name in ("forbidden.tar", "none.tar"):
            keys, broken = read(f"{server.url}/{name}")
            assert server.asked[name] == 1 and "the server answers" in str(broken)


def test_a_server_that_does_not_answer_is_waited_for(shard, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    with serve(shard.parent) as server:
        server.status = {shard.name: 503}
        threading.Timer(0.4, server.status.clear).start()
        found = [sample.key for sample in samples(f"{server.url}/{shard.name}", retry_seconds=20)]
        assert found == list(indexed(shard)) and server.asked[shard.name] > 2
        server.status = {shard.name: 503}
        with pytest.raises(ShardError, match=r"answers 503.* start the same command: it goes on"):
            list(samples(f"{server.url}/{shard.name}", retry_seconds=0.2))

"""The fast tar walk against the tarfile module's."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data import format, headers, synthetic


def tar(path: Path, names: list[str], *, kind: int = tarfile.USTAR_FORMAT, **owner: object) -> Path:
    with tarfile.open(path, "w", format=kind) as file:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300 % 1100
            info.mode, info.mtime, info.uid = 0o644, 1_700_000_000 + number, 1000
            for field, value in owner.items():
                setattr(info, field, value)
            file.addfile(info, io.BytesIO(b"x" * info.size))
    return path


NAMES = ["a.jpg", "a.txt", "folder/b.tar.gz", "folder/.hidden.jpg", "c", "é/ü.JPG", "b.txt", "a.json", "./d.png"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_is_tarfiles(tmp_path: Path, kind: int) -> None:
    long = ["p" * 90 + "/" + "q" * 60 + f"/{n}.jpg" for n in range(2)]
    for number, names in enumerate((NAMES, NAMES + long, [])):
        path = tar(tmp_path / f"{number}.tar", names, kind=kind, uname="someone")
        assert headers.scan(path) == format.scan(path)


def outcome(scan: Callable[[Path], list[format.Entry]], path: Path) -> object:
    try:
        return scan(path)
    except format.ShardError as error:
        return str(error)


@pytest.mark.parametrize(
    "kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.AREGTYPE]
)
def test_links_and_folders_are_judged_as_tarfile_does(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name, how in (("x/y.jpg", kind), ("x/z.jpg", tarfile.REGTYPE), ("x/", kind)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = how, "elsewhere"
            file.addfile(info)
    assert outcome(headers.scan, path) == outcome(format.scan, path)


def test_the_plain_case_does_not_ask_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = synthetic.write(tmp_path, shards=1, samples=5, size=8)
    monkeypatch.setattr(format, "scan_file", None)
    assert headers.scan(path) == format.read_index(path)


def test_damage_is_judged_as_tarfile_does(tmp_path: Path) -> None:
    [whole] = [path.read_bytes() for path in synthetic.write(tmp_path / "in", shards=1, samples=3, size=8)]
    path, draw = tmp_path / "damaged.tar", random.Random(0)
    for _ in range(150):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.choice([0, 1, 3])):
            if data:
                data[draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(600, len(data)))] ^= 255
        path.write_bytes(data)
        assert outcome(headers.scan, path) == outcome(format.scan, path)
    for data in (whole + whole, whole[:-1024], whole[:-512], whole + b"\0" * 4096, b"\0" * 1024, b""):
        path.write_bytes(data)
        assert outcome(headers.scan, path) == outcome(format.scan, path)


def crafted(data: bytes, at: int, field: slice, new: bytes) -> bytes:
    """Return a tar with a field of the header at byte `at` changed and its checksum made right again."""
    head = bytearray(data[at : at + 512])
    head[field] = new
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:at] + bytes(head) + data[at + 512 :]


SIZE, KIND = slice(124, 136), slice(156, 157)


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"\xff" * 10 + b"\xfe\0", b"000000000053", b"\x0000000005\0\0", b"1_0"]
)
@pytest.mark.parametrize("name", ["b.jpg", ".b.jpg"])
def test_odd_sizes_lead_neither_backwards_nor_elsewhere(tmp_path: Path, size: bytes, name: str) -> None:
    path = tar(tmp_path / "a.tar", ["a.jpg", name])
    path.write_bytes(crafted(path.read_bytes(), 512, SIZE, size.ljust(12, b"\0")))
    assert outcome(headers.scan, path) == outcome(format.scan, path)


def test_crafted_headers_are_judged_as_tarfile_does(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", ["x/a.jpg", "b.jpg", ".c.jpg"]).read_bytes()
    path, draw = tmp_path / "crafted.tar", random.Random(2)
    for _ in range(300):
        at, field = draw.choice((0, 512, 1536)), draw.choice(((0, 100), (124, 136), (156, 157), (257, 265), (345, 500)))
        byte = draw.randrange(*field)
        new = bytes([draw.choice((0, 32, 45, 47, 48, 51, 53, 95, 128, 255))])
        path.write_bytes(crafted(whole, at, slice(byte, byte + 1), new))
        assert outcome(headers.scan, path) == outcome(format.scan, path)

"""The fast tar walk against the tarfile module's, the header parser against Pillow."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_tools import _header, _peek, _scan
from pretrain.data import format as shards
from pretrain.data.decode import DecodeError
from tests.data_tools import sets


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
        assert _scan.scan(path) == shards.scan(path)


def outcome(scan: Callable[[Path], list[shards.Entry]], path: Path) -> object:
    try:
        return scan(path)
    except shards.ShardError as error:
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
    assert outcome(_scan.scan, path) == outcome(shards.scan, path)


def test_the_plain_case_does_not_ask_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sets.pairs(tmp_path, number=1)
    monkeypatch.setattr(shards, "scan", None)
    assert _scan.scan(folder / "train-00000.tar") == shards.read_index(folder / "train-00000.tar")


def test_damage_is_judged_as_tarfile_does(tmp_path: Path) -> None:
    whole = (sets.pairs(tmp_path / "in", number=1, samples=3) / "train-00000.tar").read_bytes()
    path, draw = tmp_path / "damaged.tar", random.Random(0)
    for _ in range(150):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.choice([0, 1, 3])):
            if data:
                data[draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(600, len(data)))] ^= 255
        path.write_bytes(data)
        assert outcome(_scan.scan, path) == outcome(shards.scan, path)
    for data in (whole + whole, whole[:-1024], whole[:-512], whole + b"\0" * 4096, b"\0" * 1024, b""):
        path.write_bytes(data)
        assert outcome(_scan.scan, path) == outcome(shards.scan, path)


def pictures() -> dict[str, bytes]:
    image = sets.pixels(1, 131, 77)
    exif = Image.Exif()
    exif[0x010E] = "x" * 5000
    return {
        "jpeg": sets.encoded(image),
        "progressive": sets.encoded(image, progressive=True),
        "grey": sets.encoded(image.convert("L")),
        "cmyk": sets.encoded(image.convert("CMYK")),
        "exif": sets.encoded(image, exif=exif),
        "icc": sets.encoded(image, icc_profile=b"p" * 70_000),
        "comment": sets.encoded(image, comment=b"c" * 900),
        **{f"png {mode}": sets.encoded(image.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")},
        "webp": sets.encoded(image, "WEBP", quality=60),
        "webp lossless": sets.encoded(image, "WEBP", lossless=True),
        "webp alpha": sets.encoded(image.convert("RGBA"), "WEBP", exif=exif),
        "webp animated": sets.encoded(image, "WEBP", save_all=True, append_images=[sets.pixels(2, 131, 77)]),
        "gif": sets.encoded(image, "GIF"),
        "bmp": sets.encoded(image, "BMP"),
        "tiff": sets.encoded(image, "TIFF"),
        "one": sets.encoded(sets.pixels(3, 1, 1)),
        "wide": sets.encoded(sets.pixels(3, 9000, 3), "PNG"),
    }


@pytest.mark.parametrize("name", pictures())
def test_header_is_pillows(name: str) -> None:
    data = pictures()[name]
    own = _peek.peek(lambda at, number: data[at : at + number], len(data))
    assert (own is None) == (name in ("gif", "bmp", "tiff"))
    assert own in (None, _header.read_header(data))
    assert _header.header_of(lambda at, number: data[at : at + number], len(data)) == _header.read_header(data)


def test_only_the_head_is_read() -> None:
    data = pictures()["icc"]
    asked: list[int] = []

    def read(at: int, number: int) -> bytes:
        asked.append(number)
        return data[at : at + number]

    assert _peek.peek(read, len(data)) == ("jpg", 131, 77)
    assert sum(asked) < 2000


def test_damaged_headers_never_give_another_size() -> None:
    """Where both have an opinion it is the same; the parser may say less about what comes after the header."""
    draw = random.Random(1)
    differ = 0
    for data in pictures().values():
        for _ in range(60):
            broken = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
            for _ in range(draw.choice([0, 1, 2])):
                broken[draw.randrange(min(len(broken), 700))] ^= 1 << draw.randrange(8)
            mine = _peek.peek(lambda at, number, b=bytes(broken): b[at : at + number], len(broken))
            try:
                theirs = _header.read_header(bytes(broken))
            except DecodeError:
                differ += mine is not None
                continue
            assert mine in (None, theirs)
    assert differ < 60, "headers that only Pillow refuses are rare"


def test_too_many_pixels_are_refused_from_the_header() -> None:
    data = bytearray(pictures()["jpeg"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(DecodeError, match="too many pixels"):
        _header.header_of(lambda at, number: bytes(data[at : at + number]), len(data))


def test_a_size_with_a_sign_does_not_lead_backwards(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", ["a.jpg", "b.jpg"])
    data = bytearray(path.read_bytes())
    data[124:136] = b"-0000001000\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert outcome(_scan.scan, path) == outcome(shards.scan, path)

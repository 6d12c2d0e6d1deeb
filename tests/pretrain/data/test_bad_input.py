"""What is wrong with real data, through the real loader: no hang, nothing is lost silently, good samples survive."""

import io
import itertools
import json
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data import format, synthetic
from pretrain.data.decode import DecodeError, decode_image
from pretrain.data.format import ShardError, ShardWriter
from pretrain.data.loader import Config, Loader, scan
from pretrain.data.quarantine import Quarantine, TooManyBad
from pretrain.data.transforms import Transform
from tests import tiny
from tests.soak import fuzz
from tests.soak.fuzz import encoded

GOOD = synthetic.sample(0, size=12, seed=0)
ROOT = Path(__file__).resolve().parents[3]


def loader(path: Path | str, *, workers: int = 0, batch_size: int = 4, **options: object) -> Loader:
    config = Config(**{"shards": str(path), "workers": workers, "lanes": 3, **options})
    more = {"transform": Transform(8), "composer": fuzz.composer(), "rank": 0, "world": 1}
    return Loader(config, batch_size=batch_size, seed=1, **more)


# -- pictures: odd ones that must be read, and headers that promise more memory than there is ------------------------


def palette() -> bytes:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb(width: int = 60_000, height: int = 60_000, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def patched(data: bytes, mark: bytes, skip: int, new: bytes) -> bytes:
    """Return bytes with `new` at `skip` behind the first `mark`."""
    at = data.index(mark) + len(mark) + skip
    return data[:at] + new + data[at + len(new) :]


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def tiff_bomb() -> bytes:
    data = encoded("RGB", "TIFF")
    for tag in (256, 257):  # width, height: a 4-byte value of type LONG in place of what is there
        data = patched(data, struct.pack("<HH", tag, 4), 4, struct.pack("<I", 60_000))
    return data


BOMBS = {
    "png": png_bomb(),
    "jpg": patched(encoded("RGB", "JPEG"), b"\xff\xc0", 3, struct.pack(">HH", 65_000, 65_000)),
    "webp": patched(animated("WEBP"), b"VP8X", 8, b"\xff\x3f\x00\xff\x3f\x00"),
    "gif": patched(encoded("P", "GIF"), b"GIF8", 2, struct.pack("<HH", 65_000, 65_000)),
    "tif": tiff_bomb(),
    "bmp": patched(encoded("RGB", "BMP"), b"BM", 16, struct.pack("<ii", 60_000, 60_000)),
    "ppm": b"P6 60000 60000 255\n" + b"0" * 100,
}


def in_little_memory(data: bytes) -> None:
    """Leave with 0 if a picture is refused for its size, and 64 MiB at most were touched for that."""
    had = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_image(data)
    except DecodeError as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - had
        os._exit((0 if grown < 64 << 10 else 5) if "over data.max_pixels" in str(error) else 3)
    os._exit(4)


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_from_their_header(kind):
    assert len(BOMBS[kind]) < 4000
    child = multiprocessing.get_context("fork").Process(target=in_little_memory, args=(BOMBS[kind],))
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_a_bomb_beside_the_pixels():
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(64 << 20), 9))
    for extra in (text, profile):
        with pytest.raises(DecodeError, match="cannot be decoded"):
            decode_image(png_bomb(4, 4, extra))


ODD = {
    "cmyk": {"jpg": encoded("CMYK", "JPEG")},
    "grey16": {"png": encoded("I;16", "PNG")},
    "grey16tiff": {"tif": encoded("I;16", "TIFF")},
    "bilevel": {"png": encoded("1", "PNG")},
    "palette": {"png": palette()},
    "turned": {"jpg": fuzz.pictures()["jpg"]},
    "gif": {"gif": animated("GIF")},
    "webp": {"webp": animated("WEBP")},
    "wide": {"png": encoded("RGB", "PNG", (900, 1))},
    "onepixel": {"png": encoded("RGB", "PNG", (1, 1))},
    "otherkind": {"jpg": encoded("RGB", "PNG")},
}


# -- samples: what is wrong with each, and the reason that the user must see -----------------------------------------

JPEG = encoded("RGB", "JPEG", (64, 64))
REASONS: dict[str, tuple[dict[str, bytes], str]] = {
    "cutjpeg": ({**GOOD, "png": JPEG[:-90]}, "cannot be decoded"),
    "cutpng": ({**GOOD, "png": GOOD["png"][:-30]}, "cannot be decoded"),
    "nothing": ({**GOOD, "png": b""}, "no known format"),
    "page": ({**GOOD, "png": b"<html>404 Not Found</html>"}, "no known format"),
    "script": ({**GOOD, "png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "no known format"),
    "nopicture": ({"txt": b"a cat"}, "no image member; it has txt"),
    "notext": ({"png": GOOD["png"]}, "no caption"),
    "blank": ({**GOOD, "txt": b" \n\t"}, "is empty"),
    "latin": ({**GOOD, "txt": "café".encode("latin-1")}, "not UTF-8 (byte 0xe9 at 3)"),
    "utf16": ({**GOOD, "txt": "a cat".encode("utf-16")}, "not UTF-8"),
    "wide": ({**GOOD, "txt": "a cat".encode("utf-16-le")}, "holds NUL"),
    "endless": ({**GOOD, "txt": b"word " * 250_000}, "over 1000000"),
    "half": ({"png": GOOD["png"], "json": b'{"caption": "\\ud83d"}'}, "half a surrogate pair"),
    "nan": ({**GOOD, "json": b'{"score": NaN}'}, "NaN is no JSON number"),
    "infinite": ({**GOOD, "json": b'{"score": 1e999}'}, "out of range"),
    "deep": ({**GOOD, "json": b"[" * 200_000}, "not JSON"),
    "digits": ({**GOOD, "json": b"[" + b"9" * 9000 + b"]"}, "not JSON"),
    "list": ({**GOOD, "json": b"[1]"}, "expected an object"),
    **{f"bomb-{kind}": ({kind: data, "txt": b"boom"}, "over data.max_pixels") for kind, data in BOMBS.items()},
}
LONG = {"png": GOOD["png"], "txt": ("Ã¤ &amp; " * 12_000).encode()}  # 96,000 characters that want repair


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A shard of odd but good samples, plain ones and bad ones."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.tar"
    with ShardWriter(path) as writer:
        for key, members in ODD.items():
            writer.add(f"odd/{key}", {**members, "txt": b"a red circle"})
        for key, (members, _) in REASONS.items():
            writer.add(f"bad/{key}", members)
        writer.add("odd/long", LONG)
        for number in range(12):
            writer.add(f"good/{number}", synthetic.sample(number, size=12, seed=0))
    return path


EXPECTED_GOOD = {*(f"odd/{key}" for key in [*ODD, "long"]), *(f"good/{number}" for number in range(12))}
SAMPLES = len(EXPECTED_GOOD) + len(REASONS)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_and_lists_every_bad_sample(mixed, workers, tmp_path):
    batches = list(itertools.islice(loader(mixed, workers=workers, batch_size=SAMPLES // 2).iterate(), 4))
    whole_epochs = 4 * (SAMPLES // 2) // SAMPLES
    assert all(len(batch) == SAMPLES // 2 for batch in batches)
    assert {key for batch in batches for key in batch.keys} == EXPECTED_GOOD
    lines = [line for batch in batches for line in batch.bad]
    assert {line["shard"] for line in lines} == {str(mixed)}
    counts = Counter(line["key"] for line in lines)
    assert counts.keys() == {f"bad/{key}" for key in REASONS}
    assert all(count >= whole_epochs for count in counts.values())
    for line in lines:
        assert REASONS[line["key"].removeprefix("bad/")][1] in line["reason"]
        assert "\n" not in line["reason"] and len(line["reason"]) < 600
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_bad_fraction=0.2)
    quarantine.add(lines)
    with pytest.raises(
        TooManyBad, match=rf"{len(lines)} of 100 samples are unusable, over data\.max_bad_fraction=0\.2"
    ):
        quarantine.sync(seen=100)
    found = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert found == lines, "written before the run is stopped"


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_and_lists_every_bad_sample(mixed, workers):
    more = {"transform": Transform(8), "composer": fuzz.composer(), "batch_size": 5, "workers": workers}
    batches = list(scan(str(mixed), reader={"caption": {}}, **more))
    assert {key for b in batches for key in b.keys[: len(b) - b.filler]} == EXPECTED_GOOD
    assert sorted(line["key"] for b in batches for line in b.bad) == sorted(f"bad/{key}" for key in REASONS)
    assert all(np.isfinite(batch.image_NCHW.float().numpy()).all() for batch in batches)


def test_a_long_caption_is_cut_where_its_tokens_would_be():
    words = fuzz.composer().tokenizer
    reader, text = "caption", "a red circle and " * 5000
    from pretrain.data.readers import base

    example = base.make({reader: {}}).read(tiny.record(txt=text.encode()))
    assert fuzz.composer().row(example, []).ids == words.wrap(words.ids(text), 24)


# -- names ---------------------------------------------------------------------------------------------------------


def tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE, *, close: bool = True) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), tarfile.REGTYPE
            out.addfile(info, io.BytesIO(data))
        if kind != tarfile.REGTYPE:
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = kind, members[0][0]
            out.addfile(info)
        end = out.offset
    path.write_bytes(buffer.getvalue() if close else buffer.getvalue()[:end])
    return path


NAMES = [
    *("../../etc/passwd", "/etc/shadow", "a/../../b", "C:\\x", "~/x", "$(touch x)", "|sh", "-rf", "x\ny", "a b"),
    *("k" * 300, "\N{GRINNING FACE}", "\udcff\udcfe"),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_names_are_keys_and_never_paths(tmp_path, workers, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    members = [(f"{name}.{ext}", GOOD[ext]) for name in NAMES for ext in ("png", "txt")]
    members += [("..", b"x"), ("...", b"x"), (".png", b"x"), ("readme", b"x")]  # no samples
    path = tar(folder / "names.tar", members)
    more = {"transform": Transform(8), "composer": fuzz.composer(), "batch_size": 4, "workers": workers}
    batches = list(scan(str(path), reader={"caption": {}}, **more))
    keys = {key for b in batches for key in b.keys[: len(b) - b.filler]}
    assert keys == set(NAMES)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["names.idx", "names.tar", "shards"]


# -- whole shards: one sentence ------------------------------------------------------------------------------------

MEMBERS = [(f"{number:03d}.{ext}", GOOD[ext]) for number in range(4) for ext in ("png", "txt")]


def cut_within(path: Path) -> None:
    tar(path, MEMBERS)
    path.write_bytes(path.read_bytes()[:3000])


def cut_between(path: Path) -> None:
    tar(path, MEMBERS, close=False)


def garbage_between(path: Path) -> None:
    data = tar(path, MEMBERS).read_bytes()
    path.write_bytes(data[: 512 * 4] + b"garbage!" * 64 + data[512 * 4 :])


def twice(path: Path) -> None:
    tar(path, [*MEMBERS, MEMBERS[0]])


def two_tars(path: Path) -> None:
    data = tar(path, MEMBERS).read_bytes()
    path.write_bytes(data * 2)


def hard_link(path: Path) -> None:
    tar(path, MEMBERS, tarfile.LNKTYPE)


def symbolic_link(path: Path) -> None:
    tar(path, MEMBERS, tarfile.SYMTYPE)


def gzipped(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(tar(path, MEMBERS).read_bytes()))


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def indexed(path: Path) -> bytes:
    format.write_index(tar(path, MEMBERS), format.scan(path))
    return format.index_path(path).read_bytes()


def index_of_another_length(path: Path) -> None:
    indexed(path)
    tar(path, [*MEMBERS, ("more.txt", b"x" * 10240)])


def index_of_another_tar(path: Path) -> None:
    indexed(path)
    tar(path, [(f"9{name[1:]}", data) for name, data in MEMBERS])


def index_cut_off(path: Path) -> None:
    format.index_path(path).write_bytes(indexed(path)[:-20])


def index_with_another_digit(path: Path) -> None:
    data = indexed(path)
    format.index_path(path).write_bytes(data[:-4] + b"8" + data[-3:])


def old_index(path: Path, row: str) -> None:
    """An index without a checksum, as earlier versions wrote it, of which one line is damaged."""
    head, first, *rows = indexed(path).decode().splitlines()
    head = " ".join(head.split(" ")[:3])
    format.index_path(path).write_text("\n".join([head, first, row, *rows[1:]]) + "\n")


def index_without_sense(path: Path) -> None:
    old_index(path, "no json\ttxt:1")


def index_beyond_the_end(path: Path) -> None:
    old_index(path, '"001"\tpng:512:99999999999')


def index_of_no_place(path: Path) -> None:
    old_index(path, '"001"\tpng:-5:12')


def manifest_of_another(path: Path) -> None:
    tar(path, MEMBERS)
    format.write_manifest(path.parent, {path.name: (7, path.stat().st_size)}, {})


def manifest_without_sense(path: Path) -> None:
    tar(path, MEMBERS)
    (path.parent / "dataset.json").write_text('{"version": 1, "shards": {"bad.tar": 5}}')


def manifest_of_too_much(path: Path) -> None:
    tar(path, MEMBERS)
    format.write_manifest(path.parent, {path.name: (2**80, path.stat().st_size)}, {})


WHOLE: list[tuple[Callable[[Path], None], str]] = [
    (cut_within, "not a readable tar .*reading stopped at byte"),
    (cut_between, "without the mark of an archive's end: it was cut off"),
    (garbage_between, "not a readable tar .*damaged"),
    (twice, "two members are called '000.png'"),
    (two_tars, "behind its end .* there is more"),
    (hard_link, "'link.txt' is a link"),
    (symbolic_link, "'link.txt' is a link"),
    (gzipped, "not a readable tar"),
    (no_bytes, "not a readable tar|holds no samples"),
    (index_of_another_length, "made for a tar of"),
    (index_of_another_tar, "which it is not; run"),
    (index_cut_off, "cut off or damaged; run"),
    (index_with_another_digit, "cut off or damaged; run"),
    (index_without_sense, "line 3 is not readable"),
    (index_beyond_the_end, "lie outside the tar|which it is not"),
    (index_of_no_place, "line 3 is not readable"),
    (manifest_of_another, "dataset.json says 7"),
    (manifest_of_too_much, "cannot hold 1208925819614629174706176 samples"),
    (manifest_without_sense, "dataset.json: not a readable manifest"),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("damage", "words"), WHOLE, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_to_a_whole_shard_is_one_sentence(tmp_path, damage, words, workers):
    damage(tmp_path / "bad.tar")
    with pytest.raises(ShardError, match=words) as caught:
        list(itertools.islice(loader(tmp_path / "bad.tar", workers=workers).iterate(), 2))
    sentence = str(caught.value)
    assert "bad.tar" in sentence or "dataset.json" in sentence
    assert "\n" not in sentence and len(sentence) < 800


@pytest.mark.slow
def test_the_command_says_it_in_one_sentence_with_its_exit_code(tmp_path):
    config = tiny.config_file(tmp_path)
    cut_within(tmp_path / "bad.tar")
    command = [sys.executable, "pretrain/main.py", "--config", str(config), f"data.shards={tmp_path}/bad.tar"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "bad.tar: not a readable tar" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# -- fuzzing: see tests/soak/fuzz.py for the rules -------------------------------------------------------------------


def trials(first: int, count: int) -> None:
    with tempfile.TemporaryDirectory(dir=fuzz.MEMORY_DISK) as folder:
        for seed in range(first, first + count):
            fuzz.guarded(seed, Path(folder))


@pytest.mark.parametrize("part", range(4))
def test_fuzz(part):
    trials(60 * part, 60)


@pytest.mark.slow
def test_fuzz_long():
    trials(10_000, 3000)

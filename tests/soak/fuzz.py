"""Random damage to tars, indexes, manifests, pictures and json, and what the loader makes of it.

    python -m tests.soak.fuzz --minutes 5 [--seed 0] [--out tests/soak/results/fuzz.md]

Each trial writes a small shard, damages it by a rule drawn from its seed, and reads it through the real loader. There
are three legal outcomes: every sample that the shard holds is in a batch or in `Batch.bad` with its shard, key and
reason; or one sentence (ShardError) that names the shard. Anything else fails, as do more than 20 seconds and more than
2 GiB beyond what the process had. A failure is repeated with `--seed N --trials 1`.
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import platform
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data import format, synthetic, tokenizer
from pretrain.data.compose import Composer
from pretrain.data.format import ShardError
from pretrain.data.loader import Config, Loader, scan
from pretrain.data.transforms import Transform

SECONDS, MEMORY = 20, 2 << 30
MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None  # fsync costs nothing there
READERS = ("caption", "caption", "vqa", "grounding", "entailment", "interleaved", "translate", "infill", "text")
Damage = Callable[[random.Random, Path], None]


@dataclasses.dataclass
class Outcome:
    """What became of one shard."""

    word: str  #: "whole", "bad samples", "refused"
    good: set[str] = dataclasses.field(default_factory=set)
    bad: dict[str, str] = dataclasses.field(default_factory=dict)  #: key -> reason
    sentence: str = ""


@cache
def composer() -> Composer:
    """Return a composer over a small trained vocabulary."""
    return Composer(tokenizer.train([f"a {label}" for label in synthetic.CLASSES], 560), context_length=24)


def encoded(mode: str, kind: str, size: tuple[int, int] = (24, 18), **options: object) -> bytes:
    """Return noise as an encoded picture of one of Pillow's modes."""
    noise = np.random.default_rng(len(mode) + len(kind)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode.startswith("I;16"):
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def pictures() -> dict[str, bytes]:
    """Return one small picture of every kind that the loader reads, by the extension of its member."""
    frames = [Image.new("RGB", (24, 18), colour) for colour in ("red", "blue")]
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": frames}
    return {
        "png": encoded("RGB", "PNG"),
        "jpg": encoded("RGB", "JPEG", exif=exif),
        "webp": encoded("RGB", "WEBP", lossless=True),
        "gif": encoded("P", "GIF", transparency=0),
        "tif": encoded("RGB", "TIFF", compression="tiff_deflate"),
        "jpeg": encoded("CMYK", "JPEG"),
        "tiff": encoded("I;16", "TIFF"),
        "bmp": encoded("L", "BMP"),
        "ppm": encoded("RGB", "PPM"),
        "png ": encoded("I;16", "PNG"),
        "png  ": encoded("LA", "PNG"),
        "webp ": encoded("RGBA", "WEBP", **more),
        "gif ": encoded("RGB", "GIF", **more),
        "tif ": encoded("CMYK", "TIFF", compression="tiff_lzw"),
        "jpg ": encoded("L", "JPEG", progressive=True),
    }


def sample(number: int) -> dict[str, bytes]:
    """Return the members of one good sample that every reader can read."""
    kinds = list(pictures())
    kind = kinds[number % len(kinds)]
    members = synthetic.sample(number, size=8, seed=0)
    tree = json.loads(members["json"])
    tree["image_info"][0]["image_name"] = kind.strip()
    tree |= {"width": None, "height": None, "box": [2, 3, 9, 8]}
    return {kind.strip(): pictures()[kind], "txt": members["txt"], "json": json.dumps(tree).encode()}


# -- damage to one member, before the shard is written: the other samples must come through --------------------


def flip(rng: random.Random, data: bytes, most: int = 8) -> bytes:
    """Return bytes of which some are others."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most) if out else 0):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def splice(rng: random.Random, data: bytes) -> bytes:
    """Return bytes of which a run is cut out, doubled, zeroed or followed by noise."""
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice((1, 7, 64, 512, 4096)))
    middle = rng.choice((b"", data[begin:end] * 2, bytes(end - begin), rng.randbytes(100)))
    return data[:begin] + middle + (b"" if rng.random() < 0.3 else data[end:])


ODD = (None, True, -1, 2**80, 1e308, "", " ", "\ud800", "x" * 70_000, "\0", [], [[]], {}, [None], {"a": "b"}, "Ä" * 99)


def retype(rng: random.Random, data: bytes) -> bytes:
    """Return json of which one value, however deep, is another."""
    tree = json.loads(data)
    node, path = tree, []
    while isinstance(node, dict | list) and node:
        place = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append((node, place))
        node = node[place]
        if rng.random() < 0.3:
            break
    parent, place = path[-1]
    parent[place] = rng.choice(ODD)
    text = json.dumps(tree)
    return text.replace("null", rng.choice(("null", "NaN", "1e999", "-Infinity", "[" * 5000))).encode()


def damaged_member(rng: random.Random, members: dict[str, bytes]) -> dict[str, bytes]:
    """Return a sample's members with one of them damaged, missing or empty."""
    name = rng.choice(list(members))
    rest = {key: data for key, data in members.items() if key != name}
    how = rng.choice(("flip", "flip", "splice", "empty", "missing", "swap", "retype", "retype"))
    if how == "missing":
        return rest
    if how == "retype":
        return {**members, "json": retype(rng, members["json"])}
    other = {"flip": flip(rng, members[name]), "splice": splice(rng, members[name]), "empty": b""}
    return {**rest, name: other.get(how, members[rng.choice(list(members))])}


# -- damage to the files of a shard ----------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file in place."""
    path.write_bytes(change(path.read_bytes()))


def damage_header(rng: random.Random, path: Path) -> None:
    """Change bytes of one member's header."""
    data = bytearray(path.read_bytes())
    entries = format.scan(path)
    offset, _ = rng.choice([place for entry in entries for place in entry.members.values()])
    data[offset - 512 : offset] = flip(rng, bytes(data[offset - 512 : offset]))
    path.write_bytes(data)


def damage_crafted(rng: random.Random, path: Path) -> None:
    """Change bytes of one member's header and make its checksum right again."""
    data = bytearray(path.read_bytes())
    offset, _ = rng.choice([place for entry in format.scan(path) for place in entry.members.values()])
    header = bytearray(data[offset - 512 : offset])
    field = rng.choice(((0, 100), (124, 136), (124, 125), (156, 157), (257, 265), (345, 500)))
    header[slice(*field)] = flip(rng, bytes(header[slice(*field)]), most=3)
    if rng.random() < 0.3:
        header[156] = rng.choice(b"0123456789xgLKSDVNX")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[offset - 512 : offset] = header
    path.write_bytes(data)


def damage_length(rng: random.Random, path: Path) -> None:
    """Cut a tar off, within a member or between two."""
    length = path.stat().st_size
    rewrite(path, lambda data: data[: rng.choice((rng.randrange(length), 512 * rng.randrange(length // 512)))])


def damage_between(rng: random.Random, path: Path) -> None:
    """Put something between two blocks, or take blocks away."""
    at = 512 * rng.randrange(path.stat().st_size // 512)
    junk = rng.choice((rng.randbytes(512), rng.randbytes(100), bytes(512), bytes(1024), b"\n"))
    gone = rng.choice((0, 0, 512, 1024, 100))
    rewrite(path, lambda data: data[:at] + junk + data[at + gone :])


def damage_end(rng: random.Random, path: Path) -> None:
    """Put something behind the end: noise, zeros, or the same tar once more."""
    rewrite(path, lambda data: data + rng.choice((rng.randbytes(700), bytes(5120), data)))


def damage_index(rng: random.Random, path: Path) -> None:
    """Change an index: some bytes, its length, or another tar's."""
    change = rng.choice((flip, flip, splice))
    rewrite(format.index_path(path), lambda data: change(rng, data))


def damage_manifest(rng: random.Random, path: Path) -> None:
    """Change dataset.json."""
    change = rng.choice((flip, splice, retype))
    rewrite(path.with_name(format.MANIFEST), lambda data: change(rng, data))


def damage_pax(rng: random.Random, path: Path) -> None:
    """Write the tar anew with long names, which lie in blocks of their own without a checksum, and change those."""
    entries = format.scan(path)
    data = path.read_bytes()
    kind = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(path, "w", format=kind) as tar:
        for entry in entries:
            for extension, (offset, size) in entry.members.items():
                info = tarfile.TarInfo(f"{'long' * 30}/{entry.key}.{extension}")
                info.size = size
                tar.addfile(info, io.BytesIO(data[offset : offset + size]))
    blocks = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = blocks.find(b"longlong", rng.randrange(len(blocks)))
        if at >= 0:
            blocks[max(0, at - 12) : at + 130] = flip(rng, bytes(blocks[max(0, at - 12) : at + 130]))
    path.write_bytes(blocks)


def damage_anywhere(rng: random.Random, path: Path) -> None:
    """Change bytes anywhere in the tar."""
    rewrite(path, lambda data: flip(rng, data, most=rng.choice((1, 8, 200))))


FILES: tuple[Damage, ...] = (
    damage_anywhere,
    damage_header,
    damage_crafted,
    damage_length,
    damage_between,
    damage_end,
    damage_index,
    damage_manifest,
    damage_pax,
)


# -- one trial ------------------------------------------------------------------------------------------


def write(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    """Write a shard with its index and manifest."""
    path = folder / "shard-00000.tar"
    with format.ShardWriter(path) as writer:
        for number, members in enumerate(samples):
            writer.add(f"{number:04d}", members)
    format.write_manifest(folder, {path.name: (len(samples), path.stat().st_size)}, {"note": "ok"})
    return path


def read(path: Path, reader: str, *, workers: int = 0) -> Outcome:
    """Take a shard through one evaluation pass; anything but batches and a ShardError is raised."""
    more = {"transform": Transform(8), "composer": composer(), "batch_size": 4, "workers": workers}
    outcome = Outcome("whole")
    try:
        for batch in scan(str(path), reader={reader: {}}, **more):
            outcome.good |= set(batch.keys[: len(batch) - batch.filler])
            for line in batch.bad:
                assert line["shard"] == str(path) and line["reason"] and len(line["reason"]) < 600, line
                outcome.bad[line["key"]] = line["reason"]
    except ShardError as error:
        assert path.name in str(error) or format.MANIFEST in str(error), f"which shard? {error}"
        assert "\n" not in str(error) and len(str(error)) < 1500, "one sentence"
        return Outcome("refused", sentence=str(error))
    assert not outcome.good & outcome.bad.keys()
    outcome.word = "bad samples" if outcome.bad else "whole"
    return outcome


def train(path: Path, reader: str, *, workers: int) -> None:
    """Take three training batches: as many rows as asked for, or a sentence."""
    config = Config(shards=str(path), workers=workers, lanes=2, reader={reader: {}})
    try:
        loader = Loader(config, batch_size=4, seed=0, transform=Transform(8), composer=composer(), rank=0, world=1)
        for batch in itertools.islice(loader.iterate(), 3):
            assert len(batch) == 4
    except ShardError as error:
        assert path.name in str(error) or format.MANIFEST in str(error), f"which shard? {error}"


def trial(seed: int, folder: Path) -> tuple[str, str]:
    """Run one trial and return the name of its damage and its outcome.

    Raises:
        AssertionError: the outcome is none of the three; any other exception is as bad.
    """
    rng = random.Random(seed)
    count, reader = rng.randint(2, 7), rng.choice(READERS)
    first = rng.randrange(len(pictures()))
    samples = [sample(first + number) for number in range(count)]
    keys = {f"{number:04d}" for number in range(count)}
    for old in folder.iterdir():
        old.unlink()
    if rng.random() < 0.5:
        victim = rng.randrange(count)
        samples[victim] = damaged_member(rng, samples[victim])
        path = write(folder, samples)
        outcome = read(path, reader, workers=2 if seed % 50 == 0 else 0)
        if outcome.word != "refused":  # damage to a member is never the shard's
            assert outcome.good | outcome.bad.keys() == keys, "a sample was lost"
            assert outcome.good >= keys - {f"{victim:04d}"}, f"a good sample was refused: {outcome.bad}"
        else:
            assert "usable" in outcome.sentence, outcome.sentence
        name = "member"
    else:
        path = write(folder, samples)
        indexed, listed = rng.random() < 0.5, rng.random() < 0.3
        damage = rng.choice(FILES)
        damage(rng, path)
        if not indexed and damage is not damage_index:
            format.index_path(path).unlink()
        if not listed and damage is not damage_manifest:
            path.with_name(format.MANIFEST).unlink()
        outcome = read(path, reader, workers=2 if seed % 50 == 0 else 0)
        if outcome.word != "refused":
            found = outcome.good | outcome.bad.keys()
            names = {key.rpartition("/")[2] for key in found}
            renamed = damage in (damage_pax, damage_crafted)
            assert renamed or names == keys, f"samples were lost or made up: {sorted(found)}"
        name = damage.__name__.removeprefix("damage_")
    if seed % 5 == 0:
        train(path, reader, workers=2 if seed % 50 == 0 else 0)
    return name, outcome.word


class Slow(Exception):
    """A trial ran too long."""


def _too_long(*_: object) -> None:
    raise Slow(f"more than {SECONDS} s")


def guarded(seed: int, folder: Path) -> tuple[str, str]:
    """Run one trial under the limit of time."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return trial(seed, folder)
    finally:
        signal.alarm(0)


def report(counts: Counter[tuple[str, str]], failures: list[str], *, minutes: float, first: int) -> str:
    """Return the results as a page."""
    total = sum(counts.values())
    processor = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in processor if line.startswith("model name")), "?")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    words = ("whole", "bad samples", "refused")
    lines = [
        "# Fuzzing the data engine", "",
        f"`python -m tests.soak.fuzz --minutes {minutes:g} --seed {first}`: {total} trials, {len(failures)} failures, "
        f"peak memory {peak} MiB. {os.cpu_count()} cores of {model}, Python {platform.python_version()}.", "",
        "Outcomes by damage: all samples good; bad ones listed, all others good; the shard refused in a sentence.", "",
        "| damage | " + " | ".join(words) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    for damage in sorted({name for name, _ in counts}):
        lines.append(f"| {damage} | " + " | ".join(str(counts[damage, word]) for word in words) + " |")
    return "\n".join([*lines, *(["", "## Failures", ""] if failures else []), *failures]) + "\n"


def main() -> int:
    """Fuzz for a while; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--trials", type=int, default=None, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next one has the next seed")
    parser.add_argument("--out", type=Path, default=None, help="write the results there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    had = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (had + MEMORY, resource.RLIM_INFINITY))
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    begin = shown = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        for seed in itertools.count(args.seed):
            now = time.monotonic()
            if now - begin > 60 * args.minutes or (args.trials and seed - args.seed >= args.trials):
                break
            try:
                counts[guarded(seed, Path(folder))] += 1
            except Exception as error:  # whatever it is, it is what this looks for
                failures.append(f"- seed {seed}: {type(error).__name__}: {str(error)[:300]}")
                traceback.print_exc()
            if now - shown > 5:
                shown = now
                left = 60 * args.minutes - (now - begin)
                print(f"{seed - args.seed} trials, {len(failures)} failures, {left:.0f} s left", file=sys.stderr)
    page = report(counts, failures, minutes=args.minutes, first=args.seed)
    print(page)
    if args.out:
        args.out.write_text(page)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

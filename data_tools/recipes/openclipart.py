"""Open Clip Art: 8,121 drawings of strangers with titles and keywords as they came, which is: noisy.

Source: Debian's package openclipart-svg (25 MB, public domain). It is fetched by
`apt-get download`, which needs one `apt-get update` as root, and is read in memory: nothing is installed.

Titles such as "Tigre03", "gramastar" (1,375 times) and keywords such as "HASH(0x86a0bb0)" are kept: this is what pairs
from the web look like, and what `filter` and `dedup` are for. 663 drawings lie in two categories and come twice. A
drawing that is broken, or takes longer than --seconds, is listed in quarantine.jsonl. Text inside drawings is not
drawn: fonts differ from machine to machine. At 256 pixels a picture takes about 17 kB as PNG, 7 kB as WebP.

    python -m data_tools build --recipe openclipart --out data/openclipart
"""

import argparse
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from data_tools import _deb, _progress
from data_tools._arguments import fraction, positive
from data_tools._cache import cache_folder
from data_tools._folder import claim
from data_tools.recipes._draw import OVERSAMPLE
from data_tools.recipes._draw_each import Studio
from pretrain.data import format as shards
from pretrain.data.decode import BadSample

PACKAGE = "openclipart-svg"
ROOT = "usr/share/openclipart/svg/"
COPYRIGHT = "usr/share/doc/openclipart-svg/copyright"
MAX_BAD = 0.05  # more broken drawings mean a broken renderer

_DC = "{http://purl.org/dc/elements/1.1/}"
_CC = "{http://web.resource.org/cc/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


class Drawing(NamedTuple):
    """One file of the package."""

    name: str  #: folder and stem: animals/birds/eagle_01
    data: bytes

    @property
    def key(self) -> str:
        """The key of its sample: its stem alone is not unique."""
        return f"{_safe(posixpath.basename(self.name))}-{sha256(self.name.encode()).hexdigest()[:8]}"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the recipe's own options."""
    parser.add_argument("--size", type=positive, default=256, help="pixels a side (default 256)")
    parser.add_argument("--format", choices=("png", "webp"), default="png", help="of the pictures, both lossless")
    parser.add_argument("--limit", type=positive, default=None, metavar="N", help="only N drawings, chosen by hash")
    parser.add_argument("--cache", type=Path, default=None, help="where downloads are kept (default: the user's cache)")
    parser.add_argument("--shard-size", type=positive, default=500, help="drawings a shard (default 500)")
    parser.add_argument(
        "--validation-fraction", type=fraction, default=0.05, metavar="F", help="held out, by hash of the drawing"
    )
    parser.add_argument("--seconds", type=positive, default=20, help="processor time for one drawing (default 20)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that draw")


def build(args: argparse.Namespace) -> int:
    """Fetch, draw and write; shards that are there already are kept.

    Raises:
        ShardError: the package cannot be had or read, or too many drawings are broken.
    """
    package = _deb.fetch(PACKAGE, args.cache or cache_folder())
    files = _deb.read(package)
    drawings = chosen(files, args.limit)
    if not drawings:
        raise shards.ShardError(f"{package}: holds no drawings under {ROOT}; is it {PACKAGE}?")
    notes = []
    studio = Studio(size=args.size, kind=args.format, workers=args.workers, seconds=args.seconds)
    bar = _progress.bar(len(drawings), doing="draw", unit="picture")
    with claim(args.out) as state, bar, studio:
        (args.out / shards.MANIFEST).unlink(missing_ok=True)
        for name, part in cut(drawings, shard_size=args.shard_size, validation_fraction=args.validation_fraction):
            mark = _fingerprint(args, part)
            note = _kept(args.out, state, name, mark)
            if note is None:
                note = {"name": name, "fingerprint": mark, **_write(args, name, part, studio, bar)}
                shards.write_atomic(state / f"{name}.json", json.dumps(note).encode())
            bar.update(sum(n["drawings"] for n in notes) + note["drawings"] - bar.n)
            notes.append(note)
        _remove_others(args.out, state, {note["name"] for note in notes})
        (args.out / "LICENSES.md").write_text(_licence(package, files.get(COPYRIGHT, b"")), encoding="utf-8")
        return _finish(args, package, notes)


def chosen(files: dict[str, bytes], limit: int | None) -> list[Drawing]:
    """Return the drawings of the package, in an order that mixes its folders."""
    names = [name for name in files if name.startswith(ROOT) and name.endswith(".svg")]
    drawings = [Drawing(name.removeprefix(ROOT).removesuffix(".svg"), files[name]) for name in names]
    return sorted(drawings, key=lambda drawing: sha256(drawing.name.encode()).hexdigest())[:limit]


def cut(
    drawings: Sequence[Drawing], *, shard_size: int, validation_fraction: float
) -> Iterator[tuple[str, Sequence[Drawing]]]:
    """Yield (shard, its drawings); a drawing that comes twice is on one side only."""
    sides: dict[str, list[Drawing]] = {"train": [], "validation": []}
    for drawing in drawings:
        share = int(sha256(drawing.data).hexdigest(), 16) / 2**256
        sides["validation" if share < validation_fraction else "train"].append(drawing)
    for side, own in sides.items():
        for number in range(-(-len(own) // shard_size)):
            yield f"{side}-{number:05d}.tar", own[number * shard_size : (number + 1) * shard_size]


def record_of(drawing: Drawing) -> dict[str, Any]:
    """Return the json member of a drawing's sample: what its metadata say, white space aside unchanged.

    Raises:
        BadSample: the file is not XML, or says neither title nor keywords.
    """
    try:
        tree = ElementTree.fromstring(drawing.data)  # noqa: S314 (expat bounds the growth of entities)
    except ElementTree.ParseError as error:
        raise BadSample(f"drawing is not XML ({error})") from error
    works = list(tree.iter(f"{_CC}Work"))

    def said(path: str) -> list[str]:
        found = [" ".join((element.text or "").split()) for work in works for element in work.iterfind(path)]
        return list(dict.fromkeys(text for text in found if text))

    title = next(iter(said(f"{_DC}title")), "")
    keywords = said(f"{_DC}subject/{_RDF}Bag/{_RDF}li")
    captions = captions_of(title, keywords)
    if not captions:
        raise BadSample("drawing has neither title nor keywords")
    return {
        "captions": captions,
        "title": title,
        "keywords": keywords,
        "description": next(iter(said(f"{_DC}description")), ""),
        "creator": next(iter(said(f"{_DC}creator/{_CC}Agent/{_DC}title")), ""),
        "file": posixpath.basename(drawing.name),
        "folder": posixpath.dirname(drawing.name),
    }


def captions_of(title: str, keywords: Sequence[str]) -> list[str]:
    """Return what may stand under a drawing: its title, title and keywords, keywords alone."""
    listed = ", ".join(keywords)
    return list(dict.fromkeys(text for text in (title, ", ".join(filter(None, (title, listed))), listed) if text))


def _write(args: argparse.Namespace, name: str, part: Sequence[Drawing], studio: Studio, bar: Any) -> dict[str, Any]:
    """Draw and write one shard; return how it went."""
    bad: list[dict[str, str]] = []
    good: list[tuple[Drawing, dict[str, Any], str]] = []
    for drawing in part:
        try:
            good.append((drawing, record_of(drawing), drawing.data.decode("utf-8-sig")))
        except (BadSample, UnicodeDecodeError) as error:
            bad.append({"key": drawing.key, "where": drawing.name, "reason": str(error)})
    pictures = studio.draw([text for _, _, text in good])
    path = args.out / name
    with shards.ShardWriter(path) as writer:
        for (drawing, record, _), picture in zip(good, pictures, strict=True):
            if picture.problem:
                bad.append({"key": drawing.key, "where": drawing.name, "reason": picture.problem})
            else:
                text = json.dumps(record, ensure_ascii=False).encode()
                writer.add(
                    drawing.key, {args.format: picture.data, "txt": record["captions"][0].encode(), "json": text}
                )
            bar.update()
    samples, size, sha256 = writer.listed
    return {"samples": samples, "bytes": size, "sha256": sha256, "drawings": len(part), "bad": bad}


def _safe(stem: str) -> str:
    """Return a stem as a key may have it: letters, digits, dashes."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem)[:40].strip("-")


def _fingerprint(args: argparse.Namespace, part: Sequence[Drawing]) -> str:
    """Return a hash of all that decides about a shard."""
    total = sha256(repr((args.size, args.format, args.seconds, OVERSAMPLE)).encode())
    for drawing in part:
        total.update(drawing.name.encode() + b"\0" + sha256(drawing.data).digest())
    return total.hexdigest()


def _kept(out: Path, state: Path, name: str, mark: str) -> dict[str, Any] | None:
    """Return the note of a shard that is there and would be written the same again."""
    try:
        note = json.loads((state / f"{name}.json").read_bytes())
        here = {"samples": len(shards.read_index(out / name)), "bytes": (out / name).stat().st_size}
    except (OSError, ValueError):
        return None
    same = note.get("fingerprint") == mark and all(note.get(key) == value for key, value in here.items())
    return dict(note) if same else None


def _remove_others(out: Path, state: Path, names: set[str]) -> None:
    """Remove the shards of an earlier build that this one does not have."""
    for stale in state.glob("*.tar.json"):
        name = stale.name.removesuffix(".json")
        if name not in names:
            for path in (out / name, shards.index_path(out / name), stale):
                path.unlink(missing_ok=True)


def _finish(args: argparse.Namespace, package: Path, notes: Sequence[dict[str, Any]]) -> int:
    """Write quarantine and manifest and say what there is."""
    bad = sorted((row for note in notes for row in note["bad"]), key=lambda row: row["key"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    shards.write_atomic(args.out / "quarantine.jsonl", lines.encode())
    total, samples = sum(note["drawings"] for note in notes), sum(note["samples"] for note in notes)
    size = sum(note["bytes"] for note in notes)
    print(f"{args.out}: {samples} samples in {len(notes)} shards, {size / 1e6:.0f} MB; {len(bad)} drawings left out")
    for reason, number in Counter(row["reason"] for row in bad).most_common(5):
        print(f"  {number:>6}  {reason}")
    if len(bad) > max(MAX_BAD * total, 3):
        raise shards.ShardError(
            f"{args.out}: {len(bad)} of {total} drawings could not be drawn, see {args.out / 'quarantine.jsonl'}; "
            "the package or the renderer is broken: delete the package from the cache, or install another resvg_py"
        )
    counts = {note["name"]: (note["samples"], note["bytes"], note.get("sha256", "")) for note in notes}
    meta = {"recipe": "openclipart", "package": package.stem, "size": args.size, "format": args.format,
            "drawings": total, "left_out": len(bad)}  # fmt: skip
    shards.write_manifest(args.out, counts, meta)
    return 0


def _licence(package: Path, text: bytes) -> str:
    """Return LICENSES.md: whose pictures these are and what the package says about it."""
    own = "\n".join(f"    {line}".rstrip() for line in text.decode(errors="replace").strip().splitlines())
    return (
        f"# Licence of the pictures\n\nDrawn by the people whom each sample's json names as creator, collected by the "
        f"Open Clip Art Library, packaged by Debian as {package.stem}, turned into bitmaps on white.\n"
        f"All are dedicated to the public domain. The package says:\n\n{own}\n"
    )

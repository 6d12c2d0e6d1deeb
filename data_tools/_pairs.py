"""Write the rows of a source into shards, resumably.

Each finished shard leaves a note: how many rows of the source it took and a digest of them. The next run walks the
source again; a shard whose rows have not changed is kept, from the first changed one on all are written anew.
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import _progress
from data_tools._folder import claim
from data_tools._header import read_header
from data_tools._sources import Columns, Row, as_json, rows
from pretrain.config import ConfigError
from pretrain.data import format as shards
from pretrain.data.decode import BadSample

REPORT = "build-report.json"
QUARANTINE = "quarantine.jsonl"


class Note(NamedTuple):
    """What is remembered of one finished shard."""

    name: str
    rows: int
    digest: str
    samples: int
    bytes: int
    bad: list[dict[str, str]]


def build(args: argparse.Namespace) -> int:
    """Write all shards, the report and the manifest; return the exit status.

    Raises:
        ConfigError: the source cannot be read as such.
        ShardError: nothing usable, or more bad rows than allowed; the report is written all the same.
    """
    if args.validation_fraction and args.prefix == "validation":
        raise ConfigError("--prefix validation: that is what the held-out shards are called; choose another")
    columns = Columns(args.image_column, args.caption_column, args.separator, args.images)
    listing = list(itertools.islice(rows(args.source, columns=columns, leave_out=args.out), 1))
    if not listing:
        raise ConfigError(f"source {args.source}: holds no image and no row; nothing to build")
    with claim(args.out) as state:
        (args.out / shards.MANIFEST).unlink(missing_ok=True)
        total = sum(1 for _ in rows(args.source, columns=columns, leave_out=args.out))
        notes: list[Note] = []
        with _progress.bar(total, doing="build", unit="row") as bar:
            for split in dict.fromkeys(("validation", args.prefix)):
                own = (
                    row
                    for row in rows(args.source, columns=columns, leave_out=args.out)
                    if split_of(row, args.validation_fraction, args.prefix) == split
                )
                for note in _split(own, args.out, state, split=split, shard_size=args.shard_size):
                    notes.append(note)
                    bar.update(note.rows)
        return _finish(args, notes)


def key_of(row: Row) -> str:
    """Return the key of a row's sample."""
    return f"{row.number:08d}"


def split_of(row: Row, validation_fraction: float, prefix: str) -> str:
    """Return which shards a row belongs to: a function of its key alone."""
    share = int(sha256(key_of(row).encode()).hexdigest(), 16) / 2**256
    return "validation" if share < validation_fraction else prefix


def members_of(row: Row) -> dict[str, bytes]:
    """Return the members of a row's sample; only the image's header is looked at.

    Raises:
        BadSample: the row is no sample; the message is what quarantine.jsonl shows.
    """
    if row.problem:
        raise BadSample(row.problem)
    if not row.captions:
        raise BadSample("caption is empty")
    assert row.image is not None, "a row without image has a problem"
    try:
        data = row.image.read_bytes()
    except FileNotFoundError:
        raise BadSample("image file is missing") from None
    except OSError as error:
        raise BadSample(f"image file cannot be read ({error.strerror})") from error
    record = as_json(row)
    extension, _, _ = read_header(data)
    members = {extension: data, "txt": row.captions[0].encode()}
    return {**members, "json": json.dumps(record, ensure_ascii=False).encode()} if record else members


def _split(own: Iterator[Row], out: Path, state: Path, *, split: str, shard_size: int) -> Iterator[Note]:
    """Yield a note for each shard of one split, kept or written; the last may stand for bad rows only."""
    keep = True
    for number in itertools.count():
        name = f"{split}-{number:05d}.tar"
        note = _read_note(out, state, name) if keep else None
        ahead = list(itertools.islice(own, note.rows)) if note else []
        more = next(own, None) if note and note.samples < shard_size else None  # a short shard must be the last
        ahead += [more] if more else []
        if note and note.digest == _digest(ahead, shard_size):
            yield note
            continue
        keep, own = False, itertools.chain(ahead, own)
        note = _write(own, out, name, shard_size=shard_size)
        if note.samples:
            shards.write_atomic(state / f"{name}.json", json.dumps(note._asdict()).encode())
        if note.rows:
            yield note
        if note.samples < shard_size:
            _remove_from(out, state, split, number + bool(note.samples))
            return


def _read_note(out: Path, state: Path, name: str) -> Note | None:
    """Return the note of a finished shard, if its tar and index are still what the note says."""
    try:
        note = Note(**json.loads((state / f"{name}.json").read_bytes()))
        whole = (out / name).stat().st_size == note.bytes and len(shards.read_index(out / name)) == note.samples
    except (OSError, ValueError, TypeError):
        return None
    return note if whole else None


def _write(own: Iterator[Row], out: Path, name: str, *, shard_size: int) -> Note:
    """Take rows until the shard is full or none are left."""
    taken: list[Row] = []
    bad: list[dict[str, str]] = []
    writer = shards.ShardWriter(out / name)
    try:
        while len(writer.entries) < shard_size and (row := next(own, None)) is not None:
            taken.append(row)
            try:
                members = members_of(row)
            except BadSample as error:
                bad.append(
                    {"key": key_of(row), "where": row.where, "image": str(row.image or ""), "reason": str(error)}
                )
            else:
                writer.add(key_of(row), members)
        digest = _digest(taken, shard_size)
        (writer.close if writer.entries else writer.abort)()
    except BaseException:
        writer.abort()
        raise
    size = (out / name).stat().st_size if writer.entries else 0
    return Note(name, len(taken), digest, len(writer.entries), size, bad)


def _digest(taken: Sequence[Row], shard_size: int) -> str:
    """Return a hash of rows and of the size and time of their images, which is what a changed file changes."""
    total = sha256(str(shard_size).encode())
    for row in taken:
        try:
            stat = row.image.stat() if row.image else None
        except OSError:
            stat = None
        seen = (stat.st_size, stat.st_mtime_ns) if stat else ()
        total.update(repr((*row, seen)).encode())
    return total.hexdigest()


def _remove_from(out: Path, state: Path, split: str, number: int) -> None:
    """Remove the shards that an earlier build of a longer source left, from `number` on."""
    while (state / f"{split}-{number:05d}.tar.json").exists():
        path = out / f"{split}-{number:05d}.tar"
        for stale in (path, shards.index_path(path), state / f"{path.name}.json"):
            stale.unlink(missing_ok=True)
        number += 1


def _finish(args: argparse.Namespace, notes: Sequence[Note]) -> int:
    """Write report, quarantine and manifest; the manifest only if the build is good."""
    bad = sorted((row for note in notes for row in note.bad), key=lambda row: row["key"])
    total, samples = sum(note.rows for note in notes), sum(note.samples for note in notes)
    counts = {note.name: (note.samples, note.bytes) for note in notes if note.samples}
    reasons = dict(Counter(row["reason"] for row in bad).most_common())
    report: dict[str, Any] = {"rows": total, "samples": samples, "bad": len(bad), "reasons": reasons}
    shards.write_atomic(args.out / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    shards.write_atomic(args.out / QUARANTINE, lines.encode())
    print(f"{args.out}: {samples} samples in {len(counts)} shards; {len(bad)} of {total} rows left out")
    for reason, number in list(reasons.items())[:10]:
        print(f"  {number:>8}  {reason}")
    if not samples:
        raise shards.ShardError(f"{args.source}: none of {total} rows is usable; {args.out / QUARANTINE} says why")
    if len(bad) > args.max_bad_fraction * total:
        raise shards.ShardError(
            f"{args.source}: {len(bad)} of {total} rows are unusable, over --max-bad-fraction {args.max_bad_fraction}; "
            f"{args.out / QUARANTINE} lists them: mend them, or allow more and run again"
        )
    shards.write_manifest(args.out, counts, {"source": args.source.name, "shard_size": args.shard_size})
    return 0

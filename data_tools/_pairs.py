"""Write the rows of a source into shards, resumably; one row is in memory at a time."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from data_tools import _progress
from data_tools._folder import claim
from data_tools._split import Note, Split, key_of
from data_tools.sources.base import Options, Row
from pretrain import registry
from pretrain.config import ConfigError
from pretrain.data import format as shards

REPORT = "build-report.json"
QUARANTINE = "quarantine.jsonl"
SOURCES = "data_tools.sources"


def build(args: argparse.Namespace) -> int:
    """Write all shards, the report and the manifest; return the exit status.

    Raises:
        ConfigError: the source cannot be read as such.
        ShardError: nothing usable, or more bad rows than allowed; the report is written all the same.
    """
    if args.validation_fraction and args.prefix == "validation":
        raise ConfigError("--prefix validation: that is what the held-out shards are called; choose another")
    source, options = source_of(args.source, args.kind), options_of(args)
    if next(source.rows(args.source, options), None) is None:
        raise ConfigError(f"source {args.source}: holds no image and no row; nothing to build")
    with claim(args.out) as state, ExitStack() as stack:
        (args.out / shards.MANIFEST).unlink(missing_ok=True)
        splits = {
            name: stack.enter_context(Split(args.out, state, name, shard_size=args.shard_size))
            for name in dict.fromkeys(("validation", args.prefix))
        }

        def walk() -> Iterator[tuple[Split, Row]]:
            for row in source.rows(args.source, options):
                yield splits[split_of(row, args.validation_fraction, args.prefix)], row

        total = source.count(args.source, options)
        if any(split.doubtful for split in splits.values()):
            with _progress.bar(total, doing="compare", unit="row") as bar:
                for split, row in walk():
                    split.compare(row)
                    bar.update()
                    if not any(split.doubtful for split in splits.values()):
                        break
        for split in splits.values():
            split.settle()
        with _progress.bar(total, doing="build", unit="row") as bar:
            for split, row in walk():
                split.take(row)
                bar.update()
        return _finish(args, [note for split in splits.values() for note in split.finish()])


def source_of(path: Path, kind: str | None) -> ModuleType:
    """Return the module that reads a source of the kind named, or else of the one kind that claims it.

    Raises:
        ConfigError: there is no such path, or no kind claims it.
    """
    if not path.exists():
        raise ConfigError(f"source {path}: no such file or folder; name a folder of pairs, a table, .json or tars")
    if kind is not None:
        return registry.find(SOURCES, kind)
    found = [module for name in registry.names(SOURCES) if (module := registry.find(SOURCES, name)).claims(path)]
    if len(found) != 1:
        known = ", ".join(registry.names(SOURCES))
        raise ConfigError(f"source {path}: unknown kind {path.suffix!r}; say what it is with --kind ({known})")
    return found[0]


def options_of(args: argparse.Namespace) -> Options:
    """Return how the command line wants the source to be read."""
    return Options(
        image=args.image_column,
        caption=args.caption_column,
        columns=tuple(name.strip() for name in args.columns.split(",")) if args.columns else (),
        headerless=args.no_header,
        separator=args.separator,
        quotes=False if args.no_quotes else None,
        base64=args.base64,
        wordless=args.allow_wordless,
        root=args.images,
        boxes=args.boxes,
        leave_out=args.out,
    )


def split_of(row: Row, validation_fraction: float, prefix: str) -> str:
    """Return which shards a row belongs to: a function of its key alone."""
    if not validation_fraction:
        return prefix
    share = int(sha256(key_of(row).encode()).hexdigest(), 16) / 2**256
    return "validation" if share < validation_fraction else prefix


def _finish(args: argparse.Namespace, notes: Sequence[Note]) -> int:
    """Write report, quarantine and manifest; the manifest only if the build is good."""
    bad = sorted((row for note in notes for row in note.bad), key=lambda row: row["key"])
    total, samples = sum(note.rows for note in notes), sum(note.samples for note in notes)
    counts = {note.name: (note.samples, note.bytes, note.sha256) for note in notes if note.samples}
    reasons = dict(Counter(row["reason"] for row in bad).most_common())
    report: dict[str, Any] = {"rows": total, "samples": samples, "bad": len(bad), "reasons": reasons}
    shards.write_atomic(args.out / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    shards.write_atomic(args.out / QUARANTINE, lines.encode(errors="backslashreplace"))
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

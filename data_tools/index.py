"""Index shards made elsewhere, so that readers know where each sample lies; writes .idx files and dataset.json.

Examples:
  python -m data_tools index data/laion
  python -m data_tools index 'data/laion/{00000..00099}.tar'
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from data_tools import _inputs, _progress
from pretrain.data import format as shards
from pretrain.data import headers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")


def run(args: argparse.Namespace) -> int:
    """Index each shard anew; a shard that cannot be read is named on stderr, the others are indexed all the same."""
    paths = _inputs.shard_paths(args.shards)
    counts: dict[Path, dict[str, shards.Listed]] = defaultdict(dict)
    listed = {folder: shards.listed_in(folder) for folder in {path.parent for path in paths}}
    failed = 0
    with _progress.bar(len(paths), doing="index", unit="shard") as bar:
        for path in paths:
            try:
                entries = headers.scan(path)
                if not entries:
                    raise shards.ShardError(f"shard {path}: holds no samples; build it again or leave it out")
                shards.write_index(path, entries)
                counts[path.parent][path.name] = (
                    len(entries),
                    path.stat().st_size,
                    _checksum(path, listed[path.parent]),
                )
            except shards.ShardError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
            bar.update()
    for folder, found in counts.items():
        others = {name: row for name, row in listed[folder].items() if (folder / name).exists()}
        shards.write_manifest(folder, {**others, **found}, shards.read_manifest(folder)["meta"])
        print(f"{folder}: {len(found)} shards, {sum(row[0] for row in found.values())} samples")
    return 1 if failed else 0


def _checksum(path: Path, listed: dict[str, shards.Listed]) -> str:
    """Return the SHA-256 of a shard whose dataset.json has one, of the file as it is now; else nothing.

    To work it out, all of the shard must be read, not its headers alone.
    """
    return shards.sha256_of(path) if path.name in listed and listed[path.name][2] else ""

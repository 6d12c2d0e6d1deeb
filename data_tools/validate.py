"""Say whether shards can be trained on: what is missing, broken, double or empty, and how large everything is.

Image headers are read, with --decode every pixel. Exit status 0: trainable, 1: not (the report says why), 2: bad usage.

Examples:
  python -m data_tools validate data/photos --batch-size 4096 --world-size 64
  python -m data_tools validate 'data/photos/train-{00000..00011}.tar' --decode --json > report.json
"""

import argparse
import json
from typing import Any

from data_tools import _audit, _inputs, _progress
from data_tools._arguments import fraction, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")
    parser.add_argument(
        "--batch-size", type=positive, default=None, metavar="B", help="global batch: tells steps per epoch"
    )
    parser.add_argument("--world-size", type=positive, default=1, metavar="W", help="processes that share the batch")
    parser.add_argument("--max-bad-fraction", type=fraction, default=0.01, metavar="F", help="as data.max_bad_fraction")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 if the shards are trainable."""
    paths = _inputs.shard_paths(args.shards)
    audit = _audit.Audit(decode=args.decode)
    with _progress.bar(len(paths), doing="validate", unit="shard") as bar:
        for path in paths:
            audit.shard(path)
            bar.update()
    report = audit.report(max_bad_fraction=args.max_bad_fraction)
    if args.batch_size is not None:
        _steps(report, args.batch_size, args.world_size)
    report["trainable"] = not report["reasons"]
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else as_text(report))
    return 0 if report["trainable"] else 1


def as_text(report: dict[str, Any]) -> str:
    """Return the report for people."""
    lines = [f"{report['samples']} samples in {report['shards']} shards, {report['bytes'] / 1e6:.1f} MB"]
    if "steps_per_epoch" in report:
        lines.append(f"{report['steps_per_epoch']:.2f} steps an epoch, {report['rows_per_process']} rows a process")
    for kind, found in report["problems"].items():
        lines.append(f"  {found['count']:>8}  {kind}, e.g. {'; '.join(found['examples'])}")
    for kind, found in report["notes"].items():
        lines.append(f"  {found['count']:>8}  (no harm) {kind}, e.g. {'; '.join(found['examples'])}")
    for name, rows in report["histograms"].items():
        most = max((count for _, count in rows), default=1)
        lines.append(name)
        lines += [f"  {label:>12} {count:>9} {'#' * round(40 * count / most)}" for label, count in rows]
    if report["repeated_captions"]:
        lines.append("captions that come most often")
        lines += [f"  {count:>8} x {caption!r}" for caption, count in report["repeated_captions"]]
    lines += [f"NOT TRAINABLE: {reason}" for reason in report["reasons"]] or ["trainable"]
    return "\n".join(lines)


def _steps(report: dict[str, Any], batch_size: int, world_size: int) -> None:
    report["steps_per_epoch"] = report["samples"] / batch_size
    report["rows_per_process"] = batch_size // world_size
    if batch_size % world_size:
        report["reasons"].append(
            f"batch size {batch_size} is no multiple of world size {world_size}; "
            f"take {batch_size - batch_size % world_size or world_size}"
        )
    if batch_size > report["samples"]:
        report["reasons"].append(f"batch size {batch_size} is larger than the set of {report['samples']} samples")

"""Say whether shards can be trained on: what is missing, broken, double or empty, and how large everything is.

Image headers are read, with --decode every pixel. Exit status 0: trainable, 1: not (the report says why), 2: bad usage.
Killed, the same command goes on where it stopped.

Examples:
  python -m data_tools validate data/photos --batch-size 4096 --world-size 64
  python -m data_tools validate 'data/photos/train-{00000..00011}.tar' --decode --json > report.json
  python -m data_tools validate data/photos --tokenizer data/photos/tokenizer --near-duplicates
"""

import argparse
import json
from pathlib import Path
from typing import Any

from data_tools import _engine, _inputs
from data_tools._arguments import fraction, positive
from data_tools._cache import cache_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")
    parser.add_argument(
        "--near-duplicates", action="store_true", help="count pictures that look like an earlier one (decodes them)"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count captions in its tokens, too")
    parser.add_argument(
        "--context-length", type=positive, default=77, metavar="T", help="tokens of the text tower (default 77)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=None, metavar="B", help="global batch: tells steps per epoch"
    )
    parser.add_argument("--world-size", type=positive, default=1, metavar="W", help="processes that share the batch")
    parser.add_argument("--max-bad-fraction", type=fraction, default=0.01, metavar="F", help="as data.max_bad_fraction")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="where an interrupted run leaves what it knows (default: the user's cache)",
    )
    _engine.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 if the shards are trainable."""
    from data_tools import _audit  # imported late: --help needs no image library

    paths = _inputs.shard_paths(args.shards)
    if args.tokenizer is not None:
        from pretrain.data import tokenizer

        tokenizer.load(args.tokenizer)  # a wrong one is told before the first shard is read
    looks = [_audit.Look(path, args.decode, args.tokenizer, args.near_duplicates) for path in paths]
    tasks = [
        _engine.Task(
            f"{number:06d}", asked, _engine.digest(asked.path, asked[1:], _audit.VERSION), asked.path.stat().st_size
        )
        for number, asked in enumerate(looks)
    ]
    state = args.state or state_folder(_engine.digest(*(str(path.absolute()) for path in paths), looks[0][1:]))
    audit = _audit.Audit(paths)
    for result in _engine.run(_audit.look, tasks, state=state, engine=_engine.chosen(args), doing="validate"):
        audit.add(result)
    report = audit.report(
        max_bad_fraction=args.max_bad_fraction, context_length=args.context_length, near=args.near_duplicates
    )
    if args.batch_size is not None:
        _steps(report, args.batch_size, args.world_size)
    report["trainable"] = not report["reasons"]
    shown = json.dumps(report, indent=1, ensure_ascii=False) if args.json else as_text(report)
    print(shown.encode(errors="backslashreplace").decode())  # names in a tar may be no UTF-8
    _engine.forget(state)
    return 0 if report["trainable"] else 1


def state_folder(name: str) -> Path:
    """Return where a command without output folder keeps what it knows until it is done."""
    return cache_folder() / "unfinished" / name[:24]


def as_text(report: dict[str, Any]) -> str:
    """Return the report for people."""
    lines = [f"{report['samples']} samples in {report['shards']} shards, {report['bytes'] / 1e6:.1f} MB"]
    if "steps_per_epoch" in report:
        lines.append(f"{report['steps_per_epoch']:.2f} steps an epoch, {report['rows_per_process']} rows a process")
    for kind, found in report["problems"].items():
        lines.append(f"  {found['count']:>8}  {kind}, e.g. {'; '.join(found['examples'])}")
    for kind, found in report["notes"].items():
        examples = f", e.g. {'; '.join(found['examples'])}" if found["examples"] else ""
        lines.append(f"  {found['count']:>8}  (no harm) {kind}{examples}")
    for name, rows in report["histograms"].items():
        most = max((count for _, count in rows), default=1)
        lines.append(name)
        lines += [f"  {label:>12} {count:>9} {'#' * round(40 * count / most)}" for label, count in rows]
    if report["repeated_captions"]:
        lines.append(f"captions that come most often ({report['different_captions']} different ones)")
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

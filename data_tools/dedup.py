"""Drop what is in a set twice, or in a held-out set as well: equal bytes, pictures that look alike, captions.

The first of several like samples stays (those of validation-* and test-* count as first). The set is written anew by
byte copy; dropped.jsonl names what went and what it was like, dropped.html shows some of it. The source is not touched.
The same command goes on after a stop. `reshard --without dropped.jsonl` applies a list that was edited by hand.

Examples:
  python -m data_tools dedup data/photos --out data/unique
  python -m data_tools dedup data/photos --out data/clean --against data/imagenet_val --image-distance 6
  python -m data_tools dedup data/photos --out data/look --report-only --caption-similarity 0.8 --match both
"""

import argparse
from pathlib import Path

from data_tools import _engine, _inputs
from data_tools._arguments import fraction, positive

MATCHES = ("any", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new set")
    parser.add_argument("--against", nargs="+", default=[], metavar="HELDOUT", help="drop what these shards have, too")
    parser.add_argument("--only-against", action="store_true", help="keep what is double within the set")
    parser.add_argument(
        "--image-distance",
        type=int,
        choices=range(-1, 17),
        default=4,
        metavar="BITS",
        help="of 64 bits of the perceptual hash, how many may differ (default 4; -1: compare bytes only)",
    )
    parser.add_argument(
        "--caption-similarity",
        type=fraction,
        default=None,
        metavar="S",
        help="captions at least so similar are alike, too (1: equal but for case and punctuation)",
    )
    parser.add_argument(
        "--match",
        choices=MATCHES,
        default="any",
        help="what makes two samples alike where captions count: picture or caption (any), or both (default any)",
    )
    parser.add_argument("--prefer", choices=("first", "largest"), default="first", help="which of them stays")
    parser.add_argument("--shard-size", type=positive, default=1000, metavar="N", help="samples a shard (default 1000)")
    parser.add_argument("--report-only", action="store_true", help="write the lists, not the set")
    _engine.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Find, report, and write what stays."""
    from data_tools import (
        _copy,
        _dropped,
        _duplicates,
        _likeness,
        _rows,
    )  # imported late: --help need not wait for them
    from data_tools._folder import claim
    from pretrain.config import ConfigError

    if args.only_against and not args.against:
        raise ConfigError("--only-against: name a held-out set with --against")
    if args.match == "both" and args.caption_similarity is None:
        raise ConfigError("--match both: say how similar captions must be with --caption-similarity")
    paths, held = _inputs.shard_paths(args.shards), _inputs.shard_paths(args.against)
    if both := set(paths) & set(held):
        raise ConfigError(f"{min(both)}: is in the set and in --against; name them apart")
    engine = _engine.chosen(args)
    _copy.check_out(args.out, paths)
    with claim(args.out) as state:
        source = _rows.opened([*paths, *held], state=state, engine=engine)
        found = _likeness.find(source, held=len(held), args=args, state=state, engine=engine)
        _dropped.write(found, source, args.out)
        if args.report_only:
            return 0
        keep = found.onto_N[: len(found.rows)] == _duplicates.KEPT
        own = source[: len(paths)]
        splits = _rows.by_split(found.rows[keep], own)
        meta = {"source": sorted({path.absolute().parent.name for path in paths}), "dropped": int((~keep).sum())}
        counts = _copy.write(own, splits, args.out, shard_size=args.shard_size, engine=engine, meta=meta)
    _copy.tell(args.out, counts)
    return 0

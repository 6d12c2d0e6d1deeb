"""Cut sets into new shards: another size, another order, several sets in one, a part of one, a validation split.

Members are copied byte for byte. What is in which shard depends on the options and the source alone, not on the number
of processes. The same command goes on after a stop and writes again only what changed.

Examples:
  python -m data_tools reshard data/photos --out data/large --shard-size 10000 --shuffle 1
  python -m data_tools reshard data/photos data/drawings --out data/both --validation-fraction 0.01
  python -m data_tools reshard data/photos --without data/clean/dropped.jsonl --out data/rest
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools import _engine, _inputs
from data_tools._arguments import fraction, positive

if TYPE_CHECKING:
    from data_tools import _rows

VALIDATION = "validation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces; several: merged")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new set")
    parser.add_argument("--shard-size", type=positive, default=1000, metavar="N", help="samples a shard (default 1000)")
    parser.add_argument(
        "--prefix", default=None, help="call all shards PREFIX-00000.tar (default: train-* stay train-*, and so on)"
    )
    parser.add_argument("--shuffle", type=int, default=None, metavar="SEED", help="put the samples in a random order")
    parser.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="share of validation-*.tar, by hash of key",
    )
    table = "table of shard and key: .parquet, .jsonl, or .txt with a tab between them"
    parser.add_argument("--subset", type=Path, metavar="TABLE", help=f"only what it names; {table}")
    parser.add_argument("--without", type=Path, metavar="TABLE", help="all but what it names")
    _engine.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the new set."""
    import numpy as np

    from data_tools import _choice, _copy, _rows  # imported late: --help need not wait for them
    from data_tools._folder import claim

    paths, engine = _inputs.shard_paths(args.shards), _engine.chosen(args)
    _copy.check_out(args.out, paths)
    with claim(args.out) as state:
        source = _rows.opened(paths, state=state, engine=engine)
        keep = np.ones(sum(len(shard.lines) for shard in source), bool)
        for table, wanted in ((args.subset, True), (args.without, False)):
            if table is not None:
                keep &= np.concatenate(_choice.chosen(table, source)) == wanted
        rows = _rows.all_rows(source)[keep]
        if args.shuffle is not None:
            rows = _rows.shuffled(rows, source, args.shuffle)
        splits = _rows.by_split(rows, source) if args.prefix is None else {args.prefix: rows}
        if args.validation_fraction:
            splits = split_off(splits, source, args.validation_fraction)
        renamed = sum(len(_rows.renamed(part, source)) for part in splits.values())
        meta = {"source": sorted({path.absolute().parent.name for path in paths}), "shuffle": args.shuffle}
        counts = _copy.write(source, splits, args.out, shard_size=args.shard_size, engine=engine, meta=meta)
    _copy.tell(args.out, counts)
    for split, part in splits.items():
        print(f"  {len(part):>8}  in {split}-*.tar")
    if renamed:
        print(f"  {renamed:>8}  got another key (KEY-2, ...), since an earlier sample has theirs")
    return 0


def split_off(splits: "dict[str, _rows.Rows]", source: "list[_rows.Shard]", fraction: float) -> "dict[str, _rows.Rows]":
    """Return splits with `validation` grown by a share of all others, chosen by hash of key."""
    import numpy as np

    from data_tools import _rows

    held = {
        split: _rows.held_out(rows, source, 1.0 if split == VALIDATION else fraction) for split, rows in splits.items()
    }
    validation = np.concatenate([rows[held[split]] for split, rows in splits.items()])
    return {VALIDATION: validation, **{s: rows[~held[s]] for s, rows in splits.items() if s != VALIDATION}}

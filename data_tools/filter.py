"""Keep the samples that keep to rules: size and shape of the picture, words of the captions, a score.

Every caption of a sample must pass. Samples that training would quarantine (no image, unreadable header, no caption)
go, too. What stays is written anew by byte copy; filter-report.json says how many each rule dropped and dropped.jsonl
which. The same command goes on after a stop.

A score is a column of a Parquet table beside shard and key, as `pretrain/encode.py MODEL SHARDS --scores OUT.parquet`
writes it. --keep-fraction takes the best of those that pass all other rules.

Examples:
  python -m data_tools filter data/photos --out data/good --min-side 200 --max-aspect 3 --min-words 3 --no-noise
  python -m data_tools filter data/photos --out data/best --scores clip.parquet --keep-fraction 0.3
  python -m data_tools filter data/photos --out data/look --caption-lacks '(?i)stock photo' --report-only
"""

import argparse
import re
from pathlib import Path

from data_tools import _engine, _inputs
from data_tools._arguments import fraction, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new set")
    picture = parser.add_argument_group("pictures, by their header")
    picture.add_argument("--min-side", type=positive, metavar="PX", help="shorter side at least")
    picture.add_argument("--max-side", type=positive, metavar="PX", help="longer side at most")
    picture.add_argument("--max-aspect", type=_ratio, metavar="R", help="longer side over shorter side at most")
    words = parser.add_argument_group("captions")
    words.add_argument("--min-words", type=positive, metavar="N", help="words at least")
    words.add_argument("--max-words", type=positive, metavar="N", help="words at most")
    words.add_argument("--caption-matches", type=_pattern, metavar="REGEX", help="must be found in the caption")
    words.add_argument("--caption-lacks", type=_pattern, metavar="REGEX", help="must not be found in the caption")
    words.add_argument("--min-ascii", type=fraction, metavar="F", help="share of ASCII letters at least")
    words.add_argument(
        "--no-noise",
        action="store_true",
        help="no file names, addresses, mere digits and signs, or one word over and over; any language",
    )
    score = parser.add_argument_group("scores")
    score.add_argument("--scores", type=Path, metavar="TABLE", help="table of shard, key and score")
    score.add_argument("--score-column", default="score", metavar="NAME", help="column of the score (default score)")
    score.add_argument("--min-score", type=float, metavar="X", help="score at least")
    score.add_argument("--keep-fraction", type=fraction, metavar="F", help="share of the best that stay")
    parser.add_argument("--shard-size", type=positive, default=1000, metavar="N", help="samples a shard (default 1000)")
    parser.add_argument("--report-only", action="store_true", help="write the report and the list, not the set")
    _engine.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Judge all samples, report, and write what stays."""
    from data_tools import _copy, _judge, _rows, _rules  # imported late: --help need not wait for them
    from data_tools._folder import claim
    from pretrain.config import ConfigError

    limits = _rules.options_of(args)
    by_score = args.min_score is not None or args.keep_fraction is not None
    if by_score != (args.scores is not None):
        raise ConfigError("--scores goes with --min-score or --keep-fraction: give both, or none")
    if limits == _rules.Options() and not by_score:
        raise ConfigError("no rule is given; `python -m data_tools filter --help` lists them")
    paths, engine = _inputs.shard_paths(args.shards), _engine.chosen(args)
    _copy.check_out(args.out, paths)
    with claim(args.out) as state:
        source = _rows.opened(paths, state=state, engine=engine)
        verdict = _judge.judge(source, limits, state=state, engine=engine)
        if args.scores is not None:
            score_N = _judge.scores(args.scores, args.score_column, source)
            verdict = _judge.by_score(verdict, score_N, least=args.min_score, fraction=args.keep_fraction)
        _judge.write(verdict, source, args.out)
        if args.report_only:
            return 0
        splits = _rows.by_split(_rows.all_rows(source)[verdict.kept_N], source)
        meta = {
            "source": sorted({path.absolute().parent.name for path in paths}),
            "rules": {name: value for name, value in limits._asdict().items() if value not in (None, False)},
        }
        counts = _copy.write(source, splits, args.out, shard_size=args.shard_size, engine=engine, meta=meta)
    _copy.tell(args.out, counts)
    return 0


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None
    return text


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return value

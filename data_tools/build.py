"""Turn pairs on disk, a table or a recipe into indexed shards.

SOURCE is a folder (photo.jpg beside photo.txt and/or photo.json), a .csv or .tsv with the columns image and
caption, or a .jsonl with the keys image and caption (or captions). Images are copied byte for byte. Rows that are
no sample are listed in quarantine.jsonl and counted in build-report.json. The same command goes on after a stop.

Examples:
  python -m data_tools build photos/ --out data/photos --shard-size 1000
  python -m data_tools build pairs.tsv --out data/pairs --image-column path --validation-fraction 0.01
  python -m data_tools build --recipe iconcaps --out data/iconcaps
  python -m data_tools build --recipe iconcaps --help
"""

import argparse
from pathlib import Path

from data_tools._arguments import fraction, positive
from pretrain import registry

RECIPES = "data_tools.recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every build has."""
    known = ", ".join(registry.names(RECIPES))
    parser.add_argument("--recipe", metavar="NAME", help=f"a data set that is fetched and built by name: {known}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; made where it is missing")


def extend(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Add the options of the recipe that `words` name, or those of pairs."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    name = first.parse_known_args(words)[0].recipe
    if name is None:
        _add_pairs(parser)
        return
    try:
        recipe = registry.find(RECIPES, name)
    except ValueError as error:
        parser.error(str(error))
    parser.epilog = recipe.__doc__
    recipe.add_arguments(parser.add_argument_group(f"recipe {name}"))


def run(args: argparse.Namespace) -> int:
    """Build and return the exit status."""
    if args.recipe is not None:
        return int(registry.find(RECIPES, args.recipe).build(args))
    from data_tools import _pairs  # imported late: --help needs no image library

    return _pairs.build(args)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of pairs, .csv, .tsv or .jsonl")
    parser.add_argument("--prefix", default="train", help="shards are called PREFIX-00000.tar (default train)")
    parser.add_argument("--shard-size", type=positive, default=1000, metavar="N", help="samples a shard (default 1000)")
    parser.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="share of validation-*.tar, by hash of key",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=0.01,
        metavar="F",
        help="more bad rows fail the build (default 0.01)",
    )
    table = parser.add_argument_group("tables")
    table.add_argument("--image-column", default="image", metavar="NAME", help="column or key of the image path")
    table.add_argument("--caption-column", default="caption", metavar="NAME", help="column or key of the caption")
    table.add_argument("--separator", default=None, metavar="C", help="between cells (default: tab in .tsv, else ,)")
    table.add_argument("--images", type=Path, default=None, metavar="DIR", help="where relative image paths start")

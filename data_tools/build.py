"""Turn pairs on disk, a table or a recipe into indexed shards.

Examples:
  python -m data_tools build photos/ --out data/photos --shard-size 1000
  python -m data_tools build --recipe iconcaps --out data/iconcaps
"""

import argparse
from pathlib import Path

from pretrain import registry

RECIPES = "data_tools.recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every build has."""
    known = ", ".join(registry.names(RECIPES))
    parser.add_argument("--recipe", metavar="NAME", help=f"a data set that is fetched and built by name: {known}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; made where it is missing")


def extend(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Add the options of the recipe that `words` name."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    name = first.parse_known_args(words)[0].recipe
    if name is not None:
        try:
            recipe = registry.find(RECIPES, name)
        except ValueError as error:
            parser.error(str(error))
        recipe.add_arguments(parser.add_argument_group(f"recipe {name}"))


def run(args: argparse.Namespace) -> int:
    """Build and return the exit status."""
    return int(registry.find(RECIPES, args.recipe).build(args))

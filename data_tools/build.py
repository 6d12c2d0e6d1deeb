"""Turn pairs on disk, a table, other shards or a recipe into indexed shards.

SOURCE and its kind, which is seen from what is there (or said with --kind):
  folder      photo.jpg beside photo.txt and/or photo.json, in folders of any depth (img2dataset's `files` too)
  table       .csv or .tsv of paths or base64 images, with a header, or without one and --columns
  jsonl       .jsonl with the keys image and caption (or captions)
  parquet     .parquet files: image bytes, Hugging Face's {bytes, path}, paths or base64
  coco        COCO's captions or instances .json; --boxes adds the boxes of the one to the captions of the other
  webdataset  .tar files made elsewhere (img2dataset's too); to use those as they are, run `data_tools index`

Images are copied byte for byte. Rows that are no sample are listed in quarantine.jsonl and counted in
build-report.json. The same command goes on after a stop.

Examples:
  python -m data_tools build photos/ --out data/photos --shard-size 1000
  python -m data_tools build pairs.tsv --out data/pairs --image-column path --validation-fraction 0.01
  python -m data_tools build coco/annotations/captions_train2017.json --images coco/train2017 --out data/coco
  python -m data_tools build vision_language_examples.tsv --out data/ofa --allow-wordless \\
      --columns uniq_id,image,caption,question,refs,gt_objects,dataset_name,type
  python -m data_tools build --recipe iconcaps --out data/iconcaps
  python -m data_tools build --recipe iconcaps --help
"""

import argparse
from pathlib import Path

from data_tools._arguments import fraction, positive
from pretrain import registry

RECIPES = "data_tools.recipes"
SOURCES = "data_tools.sources"


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
        _add_reading(parser.add_argument_group("how the source is read"))
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
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file; its kinds are listed below")
    parser.add_argument("--kind", choices=registry.names(SOURCES), help="what SOURCE is (default: seen from it)")
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


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image-column", metavar="NAME", help="column (name, or number: 0 ... -1) or key of the image")
    group.add_argument("--caption-column", metavar="NAME", help="likewise of the caption (default caption)")
    group.add_argument("--images", type=Path, metavar="DIR", help="where relative image paths start")
    group.add_argument("--base64", action="store_true", help="images are base64 (default: seen from each cell)")
    group.add_argument("--allow-wordless", action="store_true", help="rows without caption are samples, without txt")
    group.add_argument("--separator", metavar="C", help="between cells of a table (default: tab in .tsv, else ,)")
    group.add_argument("--no-header", action="store_true", help="the first line of a table is a row")
    group.add_argument("--columns", default="", metavar="A,B,...", help="names for a table without header")
    group.add_argument(
        "--no-quotes", action="store_true", help="quotation marks are letters (default in a headerless base64 .tsv)"
    )
    group.add_argument("--boxes", type=Path, metavar="JSON", help="COCO: the instances file of the same images")

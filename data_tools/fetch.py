"""Download a table of URLs and captions into indexed shards, with img2dataset in an environment of its own.

TABLE is a .csv, .tsv, .jsonl or .parquet with the columns url and caption; all other columns go to the json member. A
picture is made smaller where its shorter side is over --size, never larger; one that fits is stored as it came. Where
the table has a column sha256, pictures that have changed since are left out. The headers by which sites opt out
(X-Robots-Tag: noai, noindex ...) are respected. fetch-report.json says what became of the URLs.

The first use makes the environment: python -m venv and pip, about 800 MB in the user's cache. The same command goes on
after a stop: shards that are finished are kept, others are begun anew.

Examples:
  python -m data_tools fetch laion.parquet --out data/laion --url-column URL --caption-column TEXT
  python -m data_tools fetch pairs.csv --out data/pairs --size 512 --processes 16 --passes 2
"""

import argparse
import os
from pathlib import Path

from data_tools._arguments import natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("table", type=Path, metavar="TABLE", help=".csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; made where it is missing")
    parser.add_argument("--url-column", default="url", metavar="NAME", help="column of the URL (default url)")
    parser.add_argument("--caption-column", default="caption", metavar="NAME", help="of the caption (default caption)")
    parser.add_argument("--sha256-column", default="sha256", metavar="NAME", help="of the picture's hash, if there")
    parser.add_argument("--prefix", default="train", help="shards are called PREFIX-00000.tar (default train)")
    parser.add_argument("--shard-size", type=positive, default=5000, metavar="N", help="URLs a shard (default 5000)")
    how = parser.add_argument_group("how to download")
    how.add_argument("--size", type=positive, default=256, help="pixels of the shorter side, at most (default 256)")
    how.add_argument("--quality", type=positive, default=95, help="of JPEGs that are made smaller (default 95)")
    how.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="(default: the cores)")
    how.add_argument("--threads", type=positive, default=64, help="of each process (default 64)")
    how.add_argument("--timeout", type=positive, default=10, metavar="S", help="without an answer (default 10)")
    how.add_argument("--retries", type=natural, default=2, help="at once, for each URL (default 2)")
    how.add_argument("--passes", type=positive, default=1, help="2: ask failed URLs again when all are done")
    how.add_argument("--user-agent", default="diptych", metavar="TOKEN", help="named in each request (default diptych)")
    how.add_argument("--ignore-opt-out", action="store_true", help="only for pictures that you have the rights of")
    how.add_argument("--cache", type=Path, default=None, help="where the environment is kept (default: user's cache)")
    how.add_argument("--python", metavar="PATH", help="Python 3.11 or 3.12 for the environment (default: this one)")


def run(args: argparse.Namespace) -> int:
    """Download, index and report; return the exit status."""
    from data_tools import _download  # imported late: --help needs no image library

    return _download.fetch(args)

"""Draw a page that shows a data set: sizes, shapes, formats, captions, shards, and pictures with their captions.

The page is one file that asks nothing of the network. Equal shards and options give equal pages. Killed, the same
command goes on where it stopped.

Examples:
  python -m data_tools stats data/photos --out photos.html
  python -m data_tools stats 'data/photos/train-{00000..00011}.tar' --out train.html --tokenizer data/photos/tokenizer
"""

import argparse
from pathlib import Path

from data_tools import _engine, _inputs
from data_tools._arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, or tars in braces")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, an .html file")
    parser.add_argument("--title", default=None, metavar="WORDS", help="heading (default: the name of the folder)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count captions in its tokens, too")
    parser.add_argument("--pictures", type=positive, default=36, metavar="N", help="samples on the page (default 36)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (default 0)")
    _engine.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Count, draw and write."""
    from data_tools import _overview, _survey  # imported late: --help needs no image library
    from pretrain.config import ConfigError
    from pretrain.data.format import write_atomic

    paths = _inputs.shard_paths(args.shards)
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ConfigError(f"--out {args.out}: name a file in a folder that exists, e.g. stats.html")
    if args.tokenizer is not None:
        from pretrain.data import tokenizer

        tokenizer.load(args.tokenizer)  # a wrong one is told before the first shard is read
    asked = [_survey.Ask(path, args.tokenizer, args.pictures, args.seed) for path in paths]
    tasks = [
        _engine.Task(f"{number:06d}", ask, _engine.digest(ask.path, ask[1:], _survey.VERSION), ask.path.stat().st_size)
        for number, ask in enumerate(asked)
    ]
    state = args.out.with_name(f".{args.out.name}.unfinished")
    overview = _overview.Overview(paths, args.pictures)
    for result in _engine.run(_survey.surveyed, tasks, state=state, engine=_engine.chosen(args), doing="stats"):
        overview.add(result)
    title = args.title or paths[0].absolute().parent.name
    write_atomic(args.out, overview.page(title).encode())
    _engine.forget(state)
    print(f"{args.out}: {sum(overview.samples)} samples, {args.out.stat().st_size / 1e6:.1f} MB of page")
    return 0

"""Train a CLIP-style byte-pair tokenizer on the captions of shards or on text files, one caption a line.

The end tells how long captions are in tokens, which is what a context length is chosen by.

Examples:
  python -m data_tools tokenizer data/photos --vocab-size 16384 --out tokenizers/photos
  python -m data_tools tokenizer 'data/photos/train-{00000..00011}.tar' captions.txt --out tokenizers/photos
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools import _inputs, _progress
from data_tools._arguments import positive
from data_tools._captions import captions_of
from pretrain.config import ConfigError
from pretrain.data import format as shards
from pretrain.data import headers
from pretrain.data.decode import BadSample

LONGEST = 10_000  # tokens; more than any context has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("sources", nargs="+", metavar="SHARDS", help="folders, tars, tars in braces, or .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument(
        "--vocab-size", type=positive, default=4096, metavar="N", help="tokens, specials too (default 4096)"
    )


def run(args: argparse.Namespace) -> int:
    """Train, save and measure."""
    from pretrain.data import tokenizer  # imported late: --help need not wait for it

    texts = list(dict.fromkeys(_texts(args.sources)))
    if not texts:
        raise ConfigError(f"{' '.join(args.sources)}: holds no caption; nothing to learn from")
    made = tokenizer.train(texts, vocab_size=args.vocab_size)
    made.save(args.out)
    lengths = sorted(len(ids) for ids in made.encode_batch(texts, LONGEST))
    print(f"{args.out}: {made.vocab_size} tokens, learned from {len(texts)} different captions")
    shares = ", ".join(f"{share:.0%} within {lengths[int(share * (len(lengths) - 1))]}" for share in (0.5, 0.99, 1.0))
    print(f"tokens a caption, start and end included: {shares}")
    return 0


def _texts(sources: Sequence[str]) -> Iterator[str]:
    files = [Path(source) for source in sources if source.endswith(".txt")]
    tars = [source for source in sources if not source.endswith(".txt")]
    for file in files:
        try:
            yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: is not UTF-8 (byte {error.start}); convert it first") from None
    paths = _inputs.shard_paths(tars) if tars else []
    with _progress.bar(len(paths), doing="read captions", unit="shard") as bar:
        for path in paths:
            yield from _shard_texts(path)
            bar.update()


def _shard_texts(path: Path) -> Iterator[str]:
    words = ("txt", "json")
    entries = [
        shards.Entry(entry.key, {name: place for name, place in entry.members.items() if name in words})
        for entry in headers.scan(path)
    ]
    for _, members in _inputs.samples(path, entries):
        try:
            yield from captions_of(members)
        except BadSample:
            continue  # `validate` counts these

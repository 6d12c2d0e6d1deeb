"""What a command is given: shards named by folder, file or braces, and the captions inside them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from braceexpand import braceexpand

from pretrain.config import ConfigError
from pretrain.data import format as shards


def shard_paths(words: Sequence[str]) -> list[Path]:
    """Return the shards that words name: a folder stands for all tars in it, braces are expanded.

    Raises:
        ConfigError: a word names nothing.
    """
    paths: list[Path] = []
    for word in words:
        try:
            names = [Path(name) for name in braceexpand(os.path.expanduser(word))]
        except ValueError as error:
            raise ConfigError(f"{word!r} has broken braces ({error}); write train-{{00000..00011}}.tar") from None
        for name in names:
            found = sorted(p for p in name.glob("*.tar") if not p.name.startswith(".")) if name.is_dir() else [name]
            if not found:
                raise ConfigError(f"{name}: a folder without .tar files; name a folder of shards")
            if not found[0].exists():
                raise ConfigError(f"{name}: no such shard or folder; check the path and its braces")
            paths.extend(found)
    return list(dict.fromkeys(paths))


def samples(path: Path, entries: Sequence[shards.Entry]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Yield (key, members) of one shard in file order, the whole of each member read."""
    with open(path, "rb") as file:
        for entry in entries:
            yield entry.key, shards.read_members(file, entry)

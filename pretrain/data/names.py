"""What `data.shards` may say: paths, URLs, braces and @lists, and the shards that it names."""

import os
import posixpath
from pathlib import Path

from braceexpand import braceexpand

from pretrain.config import ConfigError
from pretrain.data import remote
from pretrain.data.remote import Access, Remote, Url


def expand(shards: str | list[str], access: Access | None = None) -> list[Path | Url]:
    """Return the shards that a `data.shards` value names, lists read and braces expanded, in the order given.

    `@FILE` stands for the lines of a local or remote text file, one shard or brace pattern a line, `#` for comments;
    relative names in it start from its folder.

    Raises:
        ConfigError: nothing named, a list that cannot be read, broken braces, a URL that may run programs, or a shard
            that is named twice.
        ShardError: a remote list cannot be read.
    """
    access = access or Access()
    words = [shards] if isinstance(shards, str) else list(shards)
    names: list[str] = []
    for word in words:
        lines = _listed(word[1:], access) if word.startswith("@") else [word]
        for line in lines:
            names.extend(_braces(line))
    names = [name for name in names if name]
    if not names:
        raise ConfigError("data.shards: names no shard; write e.g. icons/train-{00000..00011}.tar")
    if len(set(names)) < len(names):
        twice = next(name for name in set(names) if names.count(name) > 1)
        raise ConfigError(
            f"data.shards: {remote.shown(twice)!r} is named twice; each sample comes once an epoch, name it once"
        )
    return [_one(name, access) for name in names]


def _one(name: str, access: Access) -> Path | Url:
    kind = remote.scheme(name)
    if not kind:
        return Path(name)
    if kind in ("file", "local") and "::" not in name:
        return Path(name.partition(":")[2].removeprefix("//"))
    return remote.url(name, allow_pipe=access.allow_pipe)


def _braces(word: str) -> list[str]:
    try:
        return list(braceexpand(word if remote.scheme(word) else os.path.expanduser(word)))
    except ValueError as error:
        raise ConfigError(
            f"data.shards: {remote.shown(word)!r} has broken braces ({error}); write train-{{00000..00011}}.tar"
        ) from None


def _listed(name: str, access: Access) -> list[str]:
    where, name = _one(os.path.expanduser(name), access), remote.shown(name)
    if isinstance(where, Path):
        try:
            data = where.read_bytes()
        except OSError as error:
            raise ConfigError(f"data.shards: the list {name!r} cannot be read ({error.strerror}); check @") from None
    else:
        found = Remote(access.retry_seconds).optional(where)
        if found is None:
            raise ConfigError(f"data.shards: the list {str(where)!r} is not there or may not be read; check @")
        data = found
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"data.shards: the list {name!r} is not UTF-8 text; name one shard a line in it") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if any(line.startswith("@") for line in lines):
        raise ConfigError(f"data.shards: the list {name!r} names another list; name shards in it")
    return [_from_folder(line, where) for line in lines]


def _from_folder(line: str, where: Path | Url) -> str:
    """Return a line of a list; a relative name starts from the list's folder."""
    if remote.scheme(line) or line.startswith(("/", "~")):
        return line
    if isinstance(where, Path):
        return str(where.parent / line)
    sibling = where.sibling(posixpath.normpath(line))
    return sibling.text if sibling else line

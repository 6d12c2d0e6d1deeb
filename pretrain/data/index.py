"""From what a config names to shards with counted samples: braces, manifests, and indexes made on first use."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.data import format

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(slots=True)
class Catalog:
    """The shards of a data set, in the order in which the config names them."""

    paths: list[Path]
    sizes: list[int]  #: samples of each shard
    inline: dict[int, bytes] = field(default_factory=dict)  #: indexes that could not be written beside their shard

    def index(self, shard: int) -> bytes:
        """Return the checked index of one shard, as it lies on disk."""
        data = self.inline.get(shard)
        if data is None:
            path = self.paths[shard]
            data = format.index_path(path).read_bytes()
            format.read_head(data.partition(b"\n")[0], path)
            format.check_rows(data, path)
        return data


def expand(shards: str | list[str]) -> list[Path]:
    """Return the paths that a `data.shards` value names, braces expanded, in the order given.

    Raises:
        ConfigError: nothing named, a pipe or URL, broken braces, or a shard that is named twice.
    """
    words = [shards] if isinstance(shards, str) else list(shards)
    names: list[str] = []
    for word in words:
        if _SCHEME.match(word):
            raise ConfigError(
                f"data.shards: {word!r} is a pipe or URL; this version reads local files only. "
                "Copy the shards to a disk that every machine sees and name them there"
            )
        try:
            names.extend(braceexpand(os.path.expanduser(word)))
        except ValueError as error:
            raise ConfigError(
                f"data.shards: {word!r} has broken braces ({error}); write train-{{00000..00011}}.tar"
            ) from None
    names = [name for name in names if name]
    if not names:
        raise ConfigError("data.shards: names no shard; write e.g. icons/train-{00000..00011}.tar")
    twice = next((name for name in set(names) if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ConfigError(f"data.shards: {twice!r} is named twice; each sample comes once an epoch, name it once")
    return [Path(name) for name in names]


def resolve(shards: str | list[str]) -> Catalog:
    """Return the shards that a config names with their sample counts; index those that have no index yet.

    Any number of processes may do this at once: each starts at another shard, skips what others have finished, and
    an index appears under its name only when it is whole. In a folder that cannot be written, indexes stay in memory.

    Raises:
        ConfigError: see `expand`.
        ShardError: a shard is missing, not a tar, cut off, empty, or contradicts its index or dataset.json.
    """
    paths = expand(shards)
    catalog = Catalog(paths, [0] * len(paths))
    known: dict[Path, dict[str, dict[str, int]]] = {}
    first = dist.rank() * len(paths) // dist.world()
    turns = [*range(first, len(paths)), *range(first)]
    with tqdm(turns, desc="reading shard indexes", unit="shard", delay=3, disable=not dist.is_main()) as bar:
        for number in bar:
            path = paths[number]
            if path.parent not in known:
                known[path.parent] = format.read_manifest(path.parent)["shards"]
            catalog.sizes[number] = _count(catalog, number, known[path.parent].get(path.name))
    return catalog


def _count(catalog: Catalog, number: int, listed: dict[str, int] | None) -> int:
    """Return the samples of one shard, from its index; make the index if there is none."""
    path = catalog.paths[number]
    try:
        length = os.stat(path).st_size
    except OSError as error:
        raise format.ShardError(
            f"shard {path}: cannot be read ({error.strerror}); check data.shards and its braces"
        ) from None
    if path.is_dir():
        raise format.ShardError(f"shard {path}: is a folder; name its tars, e.g. {path}/train-{{00000..00011}}.tar")
    if listed is not None and listed.get("bytes") != length:
        raise format.ShardError(
            f"shard {path}: {length} bytes, but dataset.json says {listed.get('bytes')}; it was cut off or changed. "
            f"Fetch or build it again, or run `python -m data_tools index {path}` if the change is meant"
        )
    try:
        data = catalog.index(number)
    except FileNotFoundError:
        data = _make(catalog, number)
    samples = data.count(b"\n") - 1
    if samples < 1:
        raise format.ShardError(f"shard {path}: holds no samples; build it again or leave it out of data.shards")
    if listed is not None and listed.get("samples") != samples:
        raise format.ShardError(
            f"shard {path}: its index has {samples} samples, dataset.json says {listed.get('samples')}; "
            f"run `python -m data_tools index {path}`"
        )
    return samples


def _make(catalog: Catalog, number: int) -> bytes:
    path = catalog.paths[number]
    data = format.index_bytes(path, format.scan(path))
    try:
        format.write_atomic(format.index_path(path), data)
    except OSError:  # a read-only or full disk: every process keeps its own
        catalog.inline[number] = data
    return data

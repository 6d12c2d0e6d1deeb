"""From what a config names to shards with counted samples: dataset.json, indexes, and indexes made on first use."""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain import dist
from pretrain.data import depot, format, headers
from pretrain.data.depot import Depot
from pretrain.data.format import ShardError
from pretrain.data.names import expand
from pretrain.data.remote import Access, Url

log = logging.getLogger("diptych")
CONNECTIONS = 8  # remote indexes that are fetched side by side
PROCESSES, CHUNK = 8, 32  # at most so many read the headers of local shards, so many shards at a time


@dataclass(slots=True)
class Catalog:
    """The shards of a data set, in the order in which the config names them."""

    paths: list[Path | Url]
    sizes: list[int]  #: samples of each shard
    lengths: list[int] = field(default_factory=list)  #: bytes of each shard
    sha256: dict[int, str] = field(default_factory=dict)  #: of shards whose dataset.json gives it
    inline: dict[int, bytes] = field(default_factory=dict)  #: indexes that could not be written beside their shard
    depot: Depot | None = None  #: where remote shards come from

    def only(self, shard: int) -> "Catalog":
        """Return the catalog of one shard alone, without looking at it again."""
        one = slice(shard, shard + 1)
        sha256, inline = ({0: known[shard]} if shard in known else {} for known in (self.sha256, self.inline))
        return Catalog(self.paths[one], self.sizes[one], self.lengths[one], sha256, inline, self.depot)  # type: ignore[arg-type]

    def index(self, shard: int) -> bytes:
        """Return the index of one shard, checked against the shard's length and count, made if there is none.

        Raises:
            ShardError: there is none and none can be made, or it contradicts the shard or dataset.json.
        """
        path = self.paths[shard]
        if isinstance(path, Url):
            assert self.depot is not None
            data = self.depot.index(path, self.lengths[shard] or None, self.sizes[shard] or None)
        else:
            data = self.inline.get(shard) or _local(path)
            format.check_index(data, path, self.lengths[shard])
            if not format.index_path(path).exists():
                self.inline[shard] = data
        samples = data.count(b"\n") - 1
        if samples < 1:
            raise ShardError(f"shard {path}: holds no samples; build it again or leave it out of data.shards")
        if self.sizes[shard] and samples != self.sizes[shard]:
            raise ShardError(
                f"shard {path}: its index has {samples} samples, dataset.json says {self.sizes[shard]}; "
                f"run `python -m data_tools index {path}`"
            )
        return data


def resolve(shards: str | list[str], access: Access | None = None) -> Catalog:
    """Return the shards that a config names with their sample counts.

    Counts come from dataset.json, where there is one; indexes are then read when their shard is first used, and checked
    there. Else they come from the indexes, and shards that have none are indexed now. Any number of processes may do
    this at once: each starts at another shard, skips what others have finished, and an index appears under its name
    only when it is whole. In a folder that cannot be written, indexes stay in memory.

    Raises:
        ConfigError: see `expand`.
        ShardError: a shard is missing, not a tar, cut off, empty, or contradicts its index or dataset.json.
    """
    access = access or Access()
    paths = expand(shards, access)
    catalog = Catalog(paths, [0] * len(paths), [0] * len(paths))
    if any(isinstance(path, Url) for path in paths):
        catalog.depot = Depot(access)
    _take_listed(catalog)
    first = dist.rank() * len(paths) // dist.world()
    turns = [n for n in (*range(first, len(paths)), *range(first)) if not catalog.sizes[n]]
    if turns:
        with tqdm(total=len(turns), desc="indexing shards", unit="shard", delay=3, disable=not dist.is_main()) as bar:
            for number, length, samples in _counted(catalog, turns):
                catalog.lengths[number], catalog.sizes[number] = length, samples
                bar.update()
    depot.fits(access, [n for path, n in zip(paths, catalog.lengths) if isinstance(path, Url)])
    return catalog


def warn_if_crowded(catalogs: list[Catalog], access: Access, *, shards: int) -> None:
    """Say so where the cache cannot hold the `shards` shards that all ranks together draw from at a time.

    The batches are the same, but shards are downloaded again and again. A node holds the part of its own ranks.
    """
    far = [length for c in catalogs for path, length in zip(c.paths, c.lengths) if isinstance(path, Url)]
    if not far or access.range_reads or not dist.is_main():
        return
    here = min(1.0, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / dist.world())
    needed = here * min(shards, len(far)) * sum(far) / len(far) / depot.GIGABYTE
    if needed > access.cache_gb:
        log.warning(
            "data.cache_gb: batches are drawn from %d shards at a time, %.3g GB on this node, the cache holds %g GB; "
            "they will be downloaded again and again. Raise data.cache_gb, or lower data.lanes or data.window",
            min(shards, len(far)), needed, access.cache_gb,
        )  # fmt: skip


def _take_listed(catalog: Catalog) -> None:
    """Take what dataset.json says, and the lengths of local files."""
    known: dict[Any, dict[str, Any]] = {}
    for number, path in enumerate(catalog.paths):
        folder = path.parent if isinstance(path, Path) else path.sibling(format.MANIFEST)
        if folder not in known:
            known[folder] = _manifest(catalog, path)
        listed = known[folder].get(path.name, {})
        if isinstance(path, Path):
            catalog.lengths[number] = length = _length(path)
            if listed and listed.get("bytes") != length:
                raise ShardError(
                    f"shard {path}: {length} bytes, but dataset.json says {listed.get('bytes')}; it was cut "
                    "off or changed. Fetch or build it again, or "
                    f"run `python -m data_tools index {path}` if the change is meant"
                )
        elif listed:
            catalog.lengths[number] = int(listed.get("bytes", 0))
            catalog.sha256[number] = str(listed.get("sha256", ""))
        catalog.sizes[number] = int(listed.get("samples", 0))


def _manifest(catalog: Catalog, path: Path | Url) -> dict[str, Any]:
    if isinstance(path, Path):
        listed: dict[str, Any] = format.read_manifest(path.parent)["shards"]
        return listed
    assert catalog.depot is not None
    return catalog.depot.manifest(path)


def _length(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ShardError(f"shard {path}: cannot be read ({error.strerror}); check data.shards and its braces") from None
    if path.is_dir():
        raise ShardError(f"shard {path}: is a folder; name its tars, e.g. {path}/train-{{00000..00011}}.tar")
    return status.st_size


def _counted(catalog: Catalog, turns: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (number, bytes, samples) of shards that dataset.json does not list, their indexes made if need be."""

    def count(number: int) -> tuple[int, int, int]:
        data = catalog.index(number)
        return number, format.read_head(data, catalog.paths[number]), data.count(b"\n") - 1

    local = [n for n in turns if isinstance(catalog.paths[n], Path)]
    _make_together(catalog, local)
    yield from map(count, local)
    far = [n for n in turns if isinstance(catalog.paths[n], Url)]
    if far:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                yield from pool.map(count, far)
            finally:
                pool.shutdown(cancel_futures=True)


def _make_together(catalog: Catalog, numbers: list[int]) -> None:
    """Index the local shards that have no index, in the cores that fall to this rank."""
    paths = {n: path for n in numbers if isinstance(path := catalog.paths[n], Path)}
    bare = {n: path for n, path in paths.items() if not format.index_path(path).exists()}
    cores = min(PROCESSES, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if min(len(bare), cores) < 2 or multiprocessing.current_process().daemon:
        return  # one after the other, where they are counted
    chunk = max(1, min(CHUNK, len(bare) // (8 * cores)))  # small shards: handing one over costs as much as reading it
    with (
        ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as pool,
        tqdm(total=len(bare), desc="reading headers", unit="shard", delay=3, disable=not dist.is_main()) as bar,
    ):
        for number, data in zip(bare, pool.map(_make_there, bare.values(), chunksize=chunk)):
            if data is not None:
                catalog.inline[number] = data
            bar.update()


def _local(path: Path) -> bytes:
    try:
        return format.index_path(path).read_bytes()
    except FileNotFoundError:
        return _make(path)


def _make(path: Path) -> bytes:
    beside = format.index_path(path)
    if beside.exists():  # another process was faster
        return beside.read_bytes()
    data = format.index_bytes(os.path.getsize(path), headers.scan(path))
    with contextlib.suppress(OSError):  # a read-only or full disk: every process keeps its own
        format.write_atomic(beside, data)
    return data


def _make_there(path: Path) -> bytes | None:
    """Make an index in another process; return it only where it cannot be left beside its shard."""
    data = _make(path)
    return None if format.index_path(path).exists() else data

"""Records by place: indexed access to local tars, cached downloads and ranges, with few files and indexes open."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from pretrain import dist
from pretrain.batch import Record
from pretrain.data.depot import Depot
from pretrain.data.format import CutOff, Entry, ShardError, check_header, header_at, read_members, read_row
from pretrain.data.index import CONNECTIONS, Catalog
from pretrain.data.order import Ints, Place
from pretrain.data.prefetch import Prefetch
from pretrain.data.ranges import Ranges
from pretrain.data.remote import Url
from pretrain.dist import hash64

OPEN_FILES = 64
OPEN_INDEXES = 512  # lanes (64) x window (4), twice
AHEAD = 4  # one part in so many of the cache is for shards that are fetched before their time


class _Index:
    """One shard's index as bytes: a line is parsed only when its sample is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ends: Ints = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))

    def entry(self, member: int) -> Entry:
        return read_row(self.data[int(self.ends[member]) + 1 : int(self.ends[member + 1])])


def check(file: IO[bytes], path: Path | Url, entry: Entry) -> None:
    """Check that an open tar has a sample where its index says.

    Raises:
        ShardError: it has not.
    """
    if entry.members:
        file.seek(header_at(entry))
        check_header(file.read(tarfile.BLOCKSIZE), path, entry)


class Store:
    """Reads samples of a catalog by place. Cheap to copy into a worker: files are opened where they are used."""

    def __init__(self, catalog: Catalog, *, seed: int) -> None:
        self.catalog = catalog
        self.seed = seed
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._names: dict[int, tuple[str, str]] = {}
        self._checked: set[int] = set()  # shards that are known to be where their index says
        self._owner = os.getpid()
        self._far = _Far(catalog, catalog.depot) if catalog.depot is not None else None

    def key(self, place: Place) -> str:
        """Return the key of a sample without reading its bytes."""
        return self._entry(place).key

    def read(self, place: Place) -> Record:
        """Return the raw bytes of a sample.

        Raises:
            ShardError: the tar or its index changed since the run began.
        """
        entry = self._entry(place)
        path = self.catalog.paths[place.shard]
        shown, name = self._named(place.shard)
        try:
            if self._far is not None and isinstance(path, Url):
                members = self._far.members(place, path, entry)
            else:
                assert isinstance(path, Path)
                file = self._file(place.shard, path)
                if place.shard not in self._checked:
                    check(file, path, entry)
                members = read_members(file, entry)
                self._checked.add(place.shard)
        except CutOff as error:
            raise ShardError(f"shard {path}: {error}; it changed while it was read, fetch or build it again") from None
        # the name, not the folder: a data set that moved gives the same draws; odd bytes in a foreign key must hash too
        key = entry.key if entry.key.isascii() else entry.key.encode("utf-8", "backslashreplace").decode()
        draw = hash64(self.seed, place.epoch, name, key)
        return Record(entry.key, shown, members, epoch=place.epoch, draw=draw)

    def __call__(self, places: Iterable[Place]) -> Iterator[Record]:
        """Read a stream of places: the stage form of `read`."""
        return map(self.read, places)

    def prefetch(self, batch: int, places_of: Callable[[int], Iterable[Place]], *, sharers: int) -> None:
        """Begin to fetch what batch `batch` and those after it need; nothing is to do where all shards are local.

        `places_of` gives the places of a batch in this store, none beyond the last batch. So many `sharers` of this
        rank (workers, each with its sources) divide the room that the cache has for it.
        """
        far = self._far
        if far is None:
            return
        if far.depot.ranges:
            paths = self.catalog.paths
            asked = [(p, path) for p in places_of(batch) if isinstance(path := paths[p.shard], Url)]
            far.ranges.ask((place, path, self._entry(place)) for place, path in asked)
        else:
            far.shelf.look(batch, lambda ahead: [p.shard for p in places_of(ahead)], ahead=far.room // sharers)

    def warm(self, places: Iterable[Place]) -> None:
        """Fetch the shards of the first places, with a progress bar: what follows is fetched while others are read.

        Raises:
            ShardError: one cannot be fetched.
        """
        if self._far is not None and not self._far.depot.ranges:
            self._far.warm({place.shard for place in places})

    def __getstate__(self) -> dict[str, object]:
        return {"catalog": self.catalog, "seed": self.seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["catalog"], seed=state["seed"])  # type: ignore[misc, arg-type]

    def _entry(self, place: Place) -> Entry:
        index, path = self._indexes.get(place.shard), self.catalog.paths[place.shard]
        try:
            if index is None:
                index = self._indexes[place.shard] = _Index(self.catalog.index(place.shard))
                if len(self._indexes) > OPEN_INDEXES:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(place.shard)
            return index.entry(place.member)
        except ShardError:
            raise
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"index of {path}: line {place.member + 2} is not readable ({error!r:.200}); "
                f"run `python -m data_tools index {path}`"
            ) from error

    def _named(self, shard: int) -> tuple[str, str]:
        """Return a shard's path and name as strings, which are costly to make anew each time."""
        if shard not in self._names:
            path = self.catalog.paths[shard]
            self._names[shard] = str(path), path.name
        return self._names[shard]

    def _file(self, shard: int, path: Path) -> IO[bytes]:
        if self._owner != os.getpid():  # a fork shares file positions with its parent: open anew
            self._files = OrderedDict()
            self._owner = os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = open(path, "rb")  # noqa: SIM115
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return file


class _Far:
    """What a store does for shards that are not on this machine."""

    def __init__(self, catalog: Catalog, depot: Depot) -> None:
        self.catalog, self.depot = catalog, depot
        largest = max((n for p, n in zip(catalog.paths, catalog.lengths) if isinstance(p, Url)), default=1)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.room = depot.cache.limit // AHEAD // ranks // max(1, largest)  #: shards that a rank may fetch ahead
        self.shelf = Prefetch(self)
        self.ranges = Ranges(depot)
        self._checked: set[int] = set()

    def members(self, place: Place, path: Url, entry: Entry) -> dict[str, bytes]:
        """Return the bytes of a sample."""
        if self.depot.ranges:
            return self.ranges.members(place, path, entry)
        self.shelf.used(place.shard)
        with self._open(place.shard, path) as file:  # closed at once: an open file keeps its room on the disk
            if place.shard not in self._checked:
                check(file, path, entry)
            self._checked.add(place.shard)
            return read_members(file, entry)

    def warm(self, shards: set[int]) -> None:
        """Fetch shards, unless they are more than half of what the cache holds."""
        missing = [shard for shard in sorted(shards) if not self.here(shard)]
        if sum(self.catalog.lengths[shard] for shard in missing) > self.depot.cache.limit // 2:
            return
        with (
            ThreadPoolExecutor(CONNECTIONS) as pool,
            tqdm(total=len(missing), desc="fetching shards", unit="shard", delay=3, disable=not dist.is_main()) as bar,
        ):
            try:
                for _ in pool.map(self.fetch, missing):
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)

    def here(self, shard: int) -> bool:
        """Return whether a shard is in the cache, or on its way thanks to another process."""
        path = self.catalog.paths[shard]
        return isinstance(path, Path) or self.depot.has(path)

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache, its index too."""
        path = self.catalog.paths[shard]
        if isinstance(path, Url):
            self.catalog.index(shard)
            self._open(shard, path).close()

    def _open(self, shard: int, path: Url) -> IO[bytes]:
        return self.depot.shard(path, self.catalog.lengths[shard] or None, self.catalog.sha256.get(shard, ""))

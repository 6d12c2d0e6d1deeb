"""Records by place: indexed access to local tars, with a bounded number of open files and indexes."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

from pretrain.batch import Record
from pretrain.data.format import Entry, ShardError, check_member, index_path, read_members, read_row
from pretrain.data.index import Catalog
from pretrain.data.order import Ints, Place
from pretrain.dist import hash64

OPEN_FILES = 64
OPEN_INDEXES = 512  # lanes (64) x window (4), twice


class _Index:
    """One shard's index as bytes: a line is parsed only when its sample is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ends: Ints = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))

    def entry(self, member: int) -> Entry:
        return read_row(self.data[int(self.ends[member]) + 1 : int(self.ends[member + 1])])


class Store:
    """Reads samples of a catalog by place. Cheap to copy into a worker: files are opened where they are used."""

    def __init__(self, catalog: Catalog, *, seed: int) -> None:
        self.catalog = catalog
        self.seed = seed
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._names: dict[int, tuple[str, str]] = {}
        self._owner = os.getpid()

    def key(self, place: Place) -> str:
        """Return the key of a sample without reading its bytes."""
        return self._entry(place).key

    def read(self, place: Place) -> Record:
        """Return the raw bytes of a sample.

        Raises:
            ShardError: the tar or its index changed since the run began.
        """
        entry = self._entry(place)
        path, name = self._named(place.shard)
        try:
            members = read_members(self._file(place.shard), entry)
        except ShardError as error:
            raise ShardError(f"shard {path}: {error}; it changed while it was read, fetch or build it again") from None
        # the name, not the folder: a data set that moved gives the same draws; odd bytes in a foreign key must hash too
        key = entry.key if entry.key.isascii() else entry.key.encode("utf-8", "backslashreplace").decode()
        draw = hash64(self.seed, place.epoch, name, key)
        return Record(entry.key, path, members, epoch=place.epoch, draw=draw)

    def __call__(self, places: Iterable[Place]) -> Iterator[Record]:
        """Read a stream of places: the stage form of `read`."""
        return map(self.read, places)

    def __getstate__(self) -> dict[str, object]:
        return {"catalog": self.catalog, "seed": self.seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["catalog"], seed=state["seed"])  # type: ignore[misc, arg-type]

    def _entry(self, place: Place) -> Entry:
        index, path = self._indexes.get(place.shard), self.catalog.paths[place.shard]
        try:
            if index is None:
                index = self._indexes[place.shard] = _Index(self.catalog.index(place.shard))
                check_member(path, index.entry(place.member))
                if len(self._indexes) > OPEN_INDEXES:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(place.shard)
            return index.entry(place.member)
        except ShardError:
            raise
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"index {index_path(path)}: line {place.member + 2} is not readable ({error!r:.200}); "
                f"run `python -m data_tools index {path}`"
            ) from error

    def _named(self, shard: int) -> tuple[str, str]:
        """Return a shard's path and name as strings, which pathlib makes anew each time."""
        if shard not in self._names:
            path = self.catalog.paths[shard]
            self._names[shard] = str(path), path.name
        return self._names[shard]

    def _file(self, shard: int) -> IO[bytes]:
        if self._owner != os.getpid():  # a fork shares file positions with its parent: open anew
            self._files = OrderedDict()
            self._owner = os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = open(self.catalog.paths[shard], "rb")  # noqa: SIM115
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return file

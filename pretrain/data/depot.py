"""Remote shards and their indexes on this machine: downloaded whole into the bounded cache, or read in ranges."""

import hashlib
import json
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import IO

from pretrain.data import format, headers
from pretrain.data.cache import Cache
from pretrain.data.format import Entry, ShardError
from pretrain.data.remote import Access, Remote, Url

GIGABYTE = 10**9
FOLDER = "DIPTYCH_CACHE"  # in the environment: where to cache if the config does not say
SLACK = 1 << 16  # bytes between two members that are cheaper to read over than to ask for apart


class Depot:
    """What is fetched by URL. Cheap to copy to another process.

    Raises:
        ShardError: the cache folder cannot be used.
    """

    def __init__(self, access: Access) -> None:
        self.ranges = access.range_reads
        self.remote = Remote(access.retry_seconds)
        self.cache = Cache(folder(access), int(access.cache_gb * GIGABYTE))

    def shard(self, source: Url, length: int | None, sha256: str = "") -> IO[bytes]:
        """Return a shard, open, from the cache; it is downloaded and checked first if it is not there.

        Raises:
            ShardError: it cannot be read, is not what it should be, or does not fit.
        """
        name = _name(source, ".tar")
        if length is None:
            file = self.cache.find(name)
            if file is not None:
                return file
            length = self.remote.length(source)
        return self.cache.open(name, length, partial(self._download, source, length, sha256))

    def has(self, source: Url) -> bool:
        """Return whether a shard is cached, or being downloaded by whatever process."""
        return self.cache.has(_name(source, ".tar"))

    def index(self, source: Url, length: int | None, samples: int | None) -> bytes:
        """Return a shard's index: the cached one, the one beside it, or one made from the whole shard.

        Bytes and samples of the shard are checked where they are known.

        Raises:
            ShardError: none can be had, or it contradicts what is known.
        """
        name = _name(source, ".idx")
        file = self.cache.find(name)
        if file is not None:
            with file:
                data = file.read()
            if not _flaw(data, length, samples):
                return data
            self.cache.drop(name)  # of an older shard
        found = self._beside(source, length, samples) or self._made(source, length)
        self.cache.open(name, len(found), lambda part: part.write(found)).close()
        return found

    def members(self, source: Url, entry: Entry) -> dict[str, bytes]:
        """Return the bytes of one sample, read over the network; members that lie together in one request.

        Raises:
            ShardError: they cannot be read.
        """
        out: dict[str, bytes] = {}
        for number, run in enumerate(_runs(entry)):
            start = run[0][1] if number else format.header_at(entry)  # the first with its header, which is checked
            data = self.remote.read(source, start, run[-1][1] + run[-1][2])
            if not number:
                format.check_header(data[: tarfile.BLOCKSIZE], source, entry)
            out.update({extension: data[at - start :][:size] for extension, at, size in run})
        return {extension: out[extension] for extension in entry.members}

    def manifest(self, beside: Url) -> dict[str, dict[str, object]]:
        """Return the shards that the dataset.json beside a shard lists; empty where there is none.

        Raises:
            ShardError: there may be one, but it cannot be read.
        """
        where = beside.sibling(format.MANIFEST)
        data = self.remote.optional(where, _broken_json) if where else None
        if data is None or _page(data):
            return {}
        listed: dict[str, dict[str, object]] = format.parse_manifest(data, where)["shards"]
        return listed

    def _download(self, source: Url, length: int | None, sha256: str, part: object) -> None:
        self.remote.fill(source, part, length=length, sha256=sha256)  # type: ignore[arg-type]

    def _beside(self, source: Url, length: int | None, samples: int | None) -> bytes | None:
        where = source.index
        if where is None:
            return None
        data = self.remote.optional(where, lambda data: "" if _page(data) else _flaw(data, length, samples))
        if data is None or _page(data):
            return None
        # where nothing says how many samples there are, an old index that was cut between two of them looks whole
        return data if samples is not None or _reaches(data) else None

    def _made(self, source: Url, length: int | None) -> bytes:
        with self.shard(source, length) as file:
            entries = headers.scan_file(file, source)
            return format.index_bytes(os.fstat(file.fileno()).st_size, entries)


def folder(access: Access) -> Path:
    """Return where downloads are kept: a folder of their own, as what lies there is removed to make room."""
    if access.cache_dir is not None:
        return Path(access.cache_dir).expanduser() / "diptych-shards"
    given = os.environ.get(FOLDER)
    if given:
        return Path(given).expanduser() / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "shards"


def fits(access: Access, lengths: list[int]) -> None:
    """Refuse a cache that cannot hold the largest of some shards.

    Raises:
        ShardError: names the bound that would do.
    """
    largest = max(lengths, default=0)
    if not access.range_reads and largest > access.cache_gb * GIGABYTE:
        raise ShardError(
            f"data.cache_gb: {access.cache_gb:g} is less than the largest shard ({largest / GIGABYTE:.3g} GB); "
            "raise it, or set data.range_reads=true to read single samples over the network"
        )


def _flaw(data: bytes, length: int | None, samples: int | None) -> str:
    """Return what is wrong with an index, empty if nothing is."""
    try:
        listed = format.read_head(data, "it")
        format.check_index(data, "it", listed if length is None else length)
    except ShardError as error:
        return str(error)
    count = data.count(b"\n") - 1
    if samples not in (None, count):
        return f"it has {count} samples, dataset.json says {samples}"
    return ""


def _reaches(data: bytes) -> bool:
    """Return whether an index has a checksum, or goes to the end of its tar but for its mark and padding to records."""
    if data.partition(b"\n")[0].count(b" ") > 2:
        return True
    try:
        last = format.read_row(data[data.rindex(b"\n", 0, -1) + 1 : -1])
        end = max(at + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for at, size in last.members.values())
    except ValueError:
        return False
    gap = format.read_head(data, "it") - end - 2 * tarfile.BLOCKSIZE
    return gap == 0 or 0 < gap < tarfile.RECORDSIZE


def _broken_json(data: bytes) -> str:
    try:
        json.loads(data or b"null")
    except ValueError as error:
        return "" if _page(data) else f"it is no JSON ({error})"
    return ""


def _page(data: bytes) -> bool:
    """Return whether this is a web page: some servers answer whatever they lack with one of theirs."""
    return data.lstrip()[:1] == b"<"


def _name(source: Url, suffix: str) -> str:
    return hashlib.blake2b(source.text.encode(), digest_size=16).hexdigest() + suffix


def _runs(entry: Entry) -> list[list[tuple[str, int, int]]]:
    """Return (extension, offset, size) of the members in the tar's order, cut where the gap is wide."""
    runs: list[list[tuple[str, int, int]]] = []
    for extension, (at, size) in sorted(entry.members.items(), key=lambda member: member[1]):
        if runs and at - runs[-1][-1][1] - runs[-1][-1][2] <= SLACK:
            runs[-1].append((extension, at, size))
        else:
            runs.append([(extension, at, size)])
    return runs

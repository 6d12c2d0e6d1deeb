"""The treaty between those who write shards and those who read them. Standard library only.

A data set is a folder of plain WebDataset tars. Beside each `train-00042.tar` lies `train-00042.idx`
(where each sample's members are), and one `dataset.json` counts samples and bytes of every shard.
Readers never trust a member name as a path: names are only split into key and extension.

    train-00042.idx      diptych-index 1 <bytes of the tar>
                         <key> TAB <ext>:<offset>:<size> TAB <ext>:<offset>:<size> ...
    dataset.json         {"version": 1, "shards": {"train-00042.tar": {"samples": 1000, "bytes": ...}}, "meta": {...}}
"""

import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

VERSION = 1
MANIFEST = "dataset.json"


class ShardError(ValueError):
    """A shard or index that cannot be used; the message says which file, what is wrong and what to do."""


class Entry(NamedTuple):
    """Where one sample lies in its tar."""

    key: str
    members: dict[str, tuple[int, int]]  #: extension -> (offset of the bytes, number of bytes)


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member name: the base name is cut at its first dot, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def index_path(shard: str | Path) -> Path:
    """Return the index that belongs to a local shard."""
    return Path(shard).with_suffix(".idx")


def scan(path: str | Path) -> list[Entry]:
    """Return the samples of a local tar in file order; members of one key need not be neighbours.

    Raises:
        ShardError: missing, not a tar, or cut off; the message names the byte where reading stopped.
    """
    entries: dict[str, dict[str, tuple[int, int]]] = {}
    reached = 0
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                reached = member.offset_data + member.size
                if reached > size:
                    raise tarfile.ReadError(f"member {member.name!r} ends at byte {reached} of {size}")
                key, extension = split_name(member.name)
                if member.isfile() and extension and not member.name.rpartition("/")[2].startswith("."):
                    if extension in entries.setdefault(key, {}):
                        raise ShardError(
                            f"shard {path}: two members are called {member.name!r}; rebuild the shard with unique keys"
                        )
                    entries[key][extension] = (member.offset_data, member.size)
            stop = tar.offset
        with open(path, "rb") as file:  # tarfile takes a damaged header in mid-file for the end of the archive
            file.seek(stop)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"the header at byte {stop} of {size} is damaged")
    except FileNotFoundError:
        raise ShardError(f"shard {path}: no such file; check data.shards and its braces") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ShardError(
            f"shard {path}: not a readable tar ({error}); reading stopped at byte {reached}. "
            "Fetch or build the shard again, or leave it out of data.shards"
        ) from error
    return [Entry(key, members) for key, members in entries.items()]


def index_bytes(shard: str | Path, entries: Iterable[Entry]) -> bytes:
    """Return what the index of a local shard holds."""
    lines = [f"diptych-index {VERSION} {os.path.getsize(shard)}"]
    for key, members in entries:
        cells = [f"{json.dumps(ext)[1:-1]}:{offset}:{size}" for ext, (offset, size) in members.items()]
        lines.append("\t".join([json.dumps(key), *cells]))
    return "\n".join(lines).encode() + b"\n"


def write_index(shard: str | Path, entries: Iterable[Entry]) -> Path:
    """Write the index of a local shard under its final name only when it is complete; return its path."""
    path = index_path(shard)
    write_atomic(path, index_bytes(shard, entries))
    return path


def read_head(head: bytes, shard: str | Path) -> None:
    """Check the first line of an index.

    Raises:
        ShardError: it is no index, of another version, or made for a tar of another length.
    """
    again = f"run `python -m data_tools index {shard}`"
    try:
        word, version, size = head.decode("ascii").split(" ")
        length = int(size)
        if (word, int(version)) != ("diptych-index", VERSION):
            raise ValueError(f"version {version}, expected {VERSION}")
    except ValueError as error:
        raise ShardError(f"index {index_path(shard)}: not readable ({error}); {again}") from error
    if length != os.path.getsize(shard):
        raise ShardError(
            f"index {index_path(shard)}: made for a tar of {length} bytes, {shard} has {os.path.getsize(shard)}: "
            f"fetch the shard again if it was cut off, or {again}"
        )


def read_row(row: bytes) -> Entry:
    """Return the sample that one line of an index names.

    Raises:
        ValueError: the line is not of that form.
    """
    key, *cells = row.decode("ascii").split("\t")
    if not (key.startswith('"') and key.endswith('"')):
        raise ValueError(f"{key!r} is no key")
    places = (cell.rsplit(":", 2) for cell in cells)
    members = {json.loads(f'"{ext}"') if "\\" in ext else ext: (int(at), int(size)) for ext, at, size in places}
    return Entry(json.loads(key) if "\\" in key else key[1:-1], members)


def read_index(shard: str | Path) -> list[Entry]:
    """Return the samples that a local shard's index names.

    Raises:
        ShardError: the index is broken or belongs to a tar of another length.
        FileNotFoundError: there is no index.
    """
    head, *rows = index_path(shard).read_bytes().removesuffix(b"\n").split(b"\n")
    read_head(head, shard)
    try:
        return [read_row(row) for row in rows]
    except ValueError as error:
        raise ShardError(
            f"index {index_path(shard)}: not readable ({error}); run `python -m data_tools index {shard}`"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that its final name never shows half of it, even after a power cut."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")  # machines that share a disk may share a pid
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard and its index; same samples give the same bytes; no final name before `close`.

    Use as a context manager: an exception inside leaves no file behind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: list[Entry] = []
        self._part = self.path.with_name(f".{self.path.name}.{os.urandom(6).hex()}.part")
        self._file: IO[bytes] = open(self._part, "wb")  # noqa: SIM115 (closed in close or abort)
        self._keys: set[str] = set()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; `members` maps extension to bytes."""
        if key in self._keys:
            raise ShardError(f"shard {self.path}: key {key!r} is given twice")
        if not key or "." in key.rpartition("/")[2] or key.startswith("/") or ".." in key.split("/"):
            raise ShardError(f"shard {self.path}: key {key!r} must be a relative name without dots")
        self._keys.add(key)
        places = {}
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)  # all else stays zero: equal samples, equal bytes
            self._file.write(info.tobuf(tarfile.PAX_FORMAT))
            places[extension] = (self._file.tell(), len(data))
            self._file.write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        self.entries.append(Entry(key, places))

    def close(self) -> None:
        """Finish the tar, give it its final name, then write its index."""
        self._file.write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)
        write_index(self.path, self.entries)

    def abort(self) -> None:
        """Throw the unfinished shard away."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write_manifest(folder: str | Path, counts: Mapping[str, tuple[int, int]], meta: Mapping[str, Any]) -> Path:
    """Write dataset.json; `counts` maps shard name to (samples, bytes)."""
    shards = {name: {"samples": n, "bytes": size} for name, (n, size) in sorted(counts.items())}
    tree = {"version": VERSION, "shards": shards, "meta": dict(meta)}
    path = Path(folder) / MANIFEST
    write_atomic(path, json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")
    return path


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return dataset.json of a folder, or an empty manifest where there is none."""
    path = Path(folder) / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        if tree["version"] != VERSION or not isinstance(tree["shards"], dict):
            raise ValueError(f"version {tree['version']}, expected {VERSION}")
    except FileNotFoundError:
        return {"version": VERSION, "shards": {}, "meta": {}}
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a readable manifest ({error}); run `python -m data_tools index`") from error
    return dict(tree)


def read_members(file: IO[bytes], entry: Entry) -> dict[str, bytes]:
    """Return the bytes of one sample from an open tar.

    Raises:
        ShardError: the tar ends before the member does.
    """
    out = {}
    for extension, (offset, size) in entry.members.items():
        data = os.pread(file.fileno(), size, offset)  # half the cost of seek and read
        if len(data) != size:
            raise ShardError(f"member {entry.key}.{extension}: {len(data)} of {size} bytes; the tar is cut off")
        out[extension] = data
    return out

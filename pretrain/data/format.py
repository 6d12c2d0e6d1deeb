"""The treaty between those who write shards and those who read them. Standard library only.

A data set is a folder of plain WebDataset tars. Beside each `train-00042.tar` lies `train-00042.idx`
(where each sample's members are), and one `dataset.json` counts samples and bytes of every shard.
Readers never trust a member name as a path: names are only split into key and extension.

    train-00042.idx      diptych-index 1 <bytes of the tar>
                         <key> TAB <ext>:<offset>:<size> TAB <ext>:<offset>:<size> ...
    dataset.json         {"version": 1, "shards": {"train-00042.tar": {"samples": 1000, "bytes": ...}}, "meta": {...}}
                         a shard may have its "sha256" too: who downloads it checks it
"""

import hashlib
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


class CutOff(ShardError):
    """A shard ends before one of its members does."""


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
    try:
        with open(path, "rb") as file:
            return scan_file(file, path)
    except FileNotFoundError:
        raise ShardError(f"shard {path}: no such file; check data.shards and its braces") from None
    except OSError as error:
        raise _unreadable(path, error, 0) from error


def scan_file(file: IO[bytes], name: object, *, ended: bool = False) -> list[Entry]:
    """Return the samples of an open tar that messages call `name`.

    `ended` asks for the mark at the end of the archive: without it, a tar that was cut off between two members, of
    which nobody else knows the length, would pass for a shorter one.

    Raises:
        ShardError: not a tar, or cut off; the message names the byte where reading stopped.
    """
    entries: dict[str, dict[str, tuple[int, int]]] = {}
    reached = 0
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                reached = member.offset_data + member.size
                if reached > size:
                    raise tarfile.ReadError(f"member {member.name!r} ends at byte {reached} of {size}")
                key, extension = split_name(member.name)
                if member.isfile() and extension and not member.name.rpartition("/")[2].startswith("."):
                    if extension in entries.setdefault(key, {}):
                        raise ShardError(
                            f"shard {name}: two members are called {member.name!r}; rebuild the shard with unique keys"
                        )
                    entries[key][extension] = (member.offset_data, member.size)
            stop = tar.offset
        file.seek(stop)
        mark = file.read(tarfile.BLOCKSIZE)
        if mark.strip(b"\0"):  # tarfile takes a damaged header in mid-file for the end of the archive
            raise tarfile.ReadError(f"the header at byte {stop} of {size} is damaged")
        if ended and not mark and stop >= size:
            raise tarfile.ReadError(f"it ends after {size} bytes without the mark of an archive's end")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _unreadable(name, error, reached) from error
    return [Entry(key, members) for key, members in entries.items()]


def _unreadable(name: object, error: Exception, reached: int) -> ShardError:
    return ShardError(
        f"shard {name}: not a readable tar ({error}); reading stopped at byte {reached}. "
        "Fetch or build the shard again, or leave it out of data.shards"
    )


def index_bytes(length: int, entries: Iterable[Entry]) -> bytes:
    """Return what the index of a tar of `length` bytes holds."""
    lines = [f"diptych-index {VERSION} {length}"]
    for key, members in entries:
        cells = [f"{json.dumps(ext)[1:-1]}:{offset}:{size}" for ext, (offset, size) in members.items()]
        lines.append("\t".join([json.dumps(key), *cells]))
    return "\n".join(lines).encode() + b"\n"


def write_index(shard: str | Path, entries: Iterable[Entry]) -> Path:
    """Write the index of a local shard under its final name only when it is complete; return its path."""
    path = index_path(shard)
    write_atomic(path, index_bytes(os.path.getsize(shard), entries))
    return path


def read_head(data: bytes, shard: object) -> int:
    """Return the length of the tar that an index was made for, from its first line.

    Raises:
        ShardError: it is no index, or of another version.
    """
    try:
        word, version, size = data.partition(b"\n")[0].decode("ascii").split(" ")
        if (word, int(version)) != ("diptych-index", VERSION):
            raise ValueError(f"version {version}, expected {VERSION}")
        return int(size)
    except ValueError as error:
        raise ShardError(
            f"index of {shard}: not readable ({error}); run `python -m data_tools index {shard}`"
        ) from error


def check_head(data: bytes, shard: object, length: int) -> None:
    """Check that an index was made for a tar of this length.

    Raises:
        ShardError: it is broken, or belongs to a tar of another length.
    """
    listed = read_head(data, shard)
    if listed != length:
        raise ShardError(
            f"index of {shard}: made for a tar of {listed} bytes, the shard has {length}: fetch the shard again if it "
            f"was cut off, or run `python -m data_tools index {shard}`"
        )


def read_row(row: bytes) -> Entry:
    """Return the sample that one line of an index names.

    Raises:
        ValueError: the line is not of that form.
    """
    key, *cells = row.decode("ascii").split("\t")
    places = (cell.rsplit(":", 2) for cell in cells)
    members = {json.loads(f'"{ext}"') if "\\" in ext else ext: (int(at), int(size)) for ext, at, size in places}
    return Entry(json.loads(key), members)


def read_index(shard: str | Path) -> list[Entry]:
    """Return the samples that a local shard's index names.

    Raises:
        ShardError: the index is broken or belongs to a tar of another length.
        FileNotFoundError: there is no index.
    """
    head, *rows = index_path(shard).read_bytes().removesuffix(b"\n").split(b"\n")
    check_head(head, shard, os.path.getsize(shard))
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
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The checksum of what is written so far, for dataset.json once the shard is closed."""
        return self._hash.hexdigest()

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
            self._write(info.tobuf(tarfile.PAX_FORMAT))
            places[extension] = (self._file.tell(), len(data))
            self._write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        self.entries.append(Entry(key, places))

    def close(self) -> None:
        """Finish the tar, give it its final name, then write its index."""
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)
        write_index(self.path, self.entries)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

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


def write_manifest(
    folder: str | Path,
    counts: Mapping[str, tuple[int, int]],
    meta: Mapping[str, Any],
    *,
    sha256: Mapping[str, str] | None = None,
) -> Path:
    """Write dataset.json; `counts` maps shard name to (samples, bytes), `sha256` some of them to checksums."""
    shards: dict[str, dict[str, Any]] = {n: {"samples": c, "bytes": b} for n, (c, b) in sorted(counts.items())}
    for name in shards.keys() & (sha256 or {}).keys():
        shards[name]["sha256"] = (sha256 or {})[name]
    tree = {"version": VERSION, "shards": shards, "meta": dict(meta)}
    path = Path(folder) / MANIFEST
    write_atomic(path, json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")
    return path


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return dataset.json of a folder, or an empty manifest where there is none."""
    path = Path(folder) / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {"version": VERSION, "shards": {}, "meta": {}}
    return parse_manifest(data, path)


def parse_manifest(data: bytes, where: object) -> dict[str, Any]:
    """Return what a dataset.json says.

    Raises:
        ShardError: it is not readable.
    """
    try:
        tree = json.loads(data)
        if tree["version"] != VERSION or not isinstance(tree["shards"], dict):
            raise ValueError(f"version {tree['version']}, expected {VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where}: not a readable manifest ({error}); run `python -m data_tools index`") from error
    return dict(tree)


def read_members(file: IO[bytes], entry: Entry) -> dict[str, bytes]:
    """Return the bytes of one sample from an open tar.

    Raises:
        CutOff: the tar ends before the member does.
    """
    out = {}
    for extension, (offset, size) in entry.members.items():
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise CutOff(f"member {entry.key}.{extension}: {len(data)} of {size} bytes; the tar is cut off")
        out[extension] = data
    return out

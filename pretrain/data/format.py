"""The treaty between those who write shards and those who read them. Standard library only.

A data set is a folder of plain WebDataset tars. Beside each `train-00042.tar` lies `train-00042.idx`
(where each sample's members are), and one `dataset.json` counts samples and bytes of every shard.
Readers never trust a member name as a path: names are only split into key and extension.

    train-00042.idx      diptych-index 1 <bytes of the tar> <crc32 of the lines below; older indexes have none>
                         <key> TAB <ext>:<offset>:<size> TAB <ext>:<offset>:<size> ...
    dataset.json         {"version": 1, "shards": {"train-00042.tar": {"samples": 1000, "bytes": ...}}, "meta": {...}}
                         a shard may have its "sha256" too: who downloads it checks it
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring_ascii
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

VERSION = 1
LARGE = 1 << 24  #: bytes; larger members are checked against the length of the tar before memory is asked for them
MANIFEST = "dataset.json"


Listed = tuple[int, int, str]  #: samples, bytes and SHA-256 (empty: not known) of a shard, as dataset.json has them


class ShardError(ValueError):
    """A shard or index that cannot be used; the message says which file, what is wrong and what to do."""


class CutOff(ShardError):
    """A shard ends before one of its members does."""


class Entry(NamedTuple):
    """Where one sample lies in its tar."""

    key: str
    members: dict[str, tuple[int, int]]  #: extension -> (offset of the bytes, number of bytes)


def member_of(name: str) -> tuple[str, str] | None:
    """Return (key, extension) of a member of a sample: the base name is cut at its first dot, as WebDataset does.

    None where there is nothing before the dot (hidden files) or nothing behind it. Whoever reads tars, by whatever
    means, asks here what belongs to a sample; folders do not.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else None


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


def scan_file(file: IO[bytes], name: object) -> list[Entry]:
    """Return the samples of an open tar that messages call `name`.

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
                if member.size < 0:  # tarfile would go back, and round for ever
                    raise tarfile.ReadError(f"member {member.name!r} has a negative size")
                reached = member.offset_data + member.size
                if reached > size:
                    raise tarfile.ReadError(f"member {member.name!r} ends at byte {reached} of {size}")
                place = None if member.isdir() else member_of(member.name)
                if place is not None:
                    key, extension = place
                    if not member.isreg() or member.issparse():
                        raise tarfile.ReadError(f"member {member.name!r} is a link, a device or sparse: no plain file")
                    if extension in entries.setdefault(key, {}):
                        raise ShardError(
                            f"shard {name}: two members are called {member.name!r}; rebuild the shard with unique keys"
                        )
                    entries[key][extension] = (member.offset_data, member.size)
            stop = tar.offset
        _check_end(file, stop, size)
    except ShardError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:  # tarfile lets its own slips out
        raise _unreadable(name, error, reached) from error
    return [Entry(key, members) for key, members in entries.items()]


def _check_end(file: IO[bytes], stop: int, size: int) -> None:
    """Check that nothing but zeros follows the last member, and enough of them to tell an end from a cut.

    tarfile takes a damaged header, or a cut between two members, for the end of the archive.
    """
    file.seek(stop)
    mark = file.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {stop} of {size} is damaged")
    if len(mark) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"after {size} bytes it ends without the mark of an archive's end: it was cut off")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"behind its end at byte {stop} there is more: two tars in one, or damage")


def _unreadable(name: object, error: Exception, reached: int) -> ShardError:
    return ShardError(
        f"shard {name}: not a readable tar ({error}); reading stopped at byte {reached}. "
        "Fetch or build the shard again, or leave it out of data.shards"
    )


def index_bytes(length: int, entries: Iterable[Entry]) -> bytes:
    """Return what the index of a tar of `length` bytes holds."""
    lines = []
    quoted: dict[str, str] = {}  # extensions are few
    for key, members in entries:
        cells = []
        for ext, (offset, size) in members.items():
            if ext not in quoted:
                quoted[ext] = json.dumps(ext)[1:-1]
            cells.append(f"{quoted[ext]}:{offset}:{size}")
        lines.append("\t".join([encode_basestring_ascii(key), *cells]) + "\n")
    rows = "".join(lines).encode()
    return f"diptych-index {VERSION} {length} {zlib.crc32(rows):08x}\n".encode() + rows


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
        word, version, size, *_ = data.partition(b"\n")[0].decode("ascii").split(" ")
        if (word, int(version)) != ("diptych-index", VERSION):
            raise ValueError(f"version {version}, expected {VERSION}")
        return int(size)
    except ValueError as error:
        raise ShardError(
            f"index of {shard}: not readable ({error}); run `python -m data_tools index {shard}`"
        ) from error


def check_index(data: bytes, shard: object, length: int) -> None:
    """Check an index: its lines against the checksum in the first, where it has one, and the length of its tar.

    Raises:
        ShardError: it is cut off or damaged, or belongs to a tar of another length.
    """
    listed = read_head(data, shard)
    head, _, rows = data.partition(b"\n")
    checksum = head.split(b" ")[3:]
    if not data.endswith(b"\n") or (checksum and checksum != [b"%08x" % zlib.crc32(rows)]):
        raise ShardError(f"index of {shard}: cut off or damaged; run `python -m data_tools index {shard}`")
    if listed != length:
        raise ShardError(
            f"index of {shard}: made for a tar of {listed} bytes, the shard has {length}: fetch the shard again if it "
            f"was cut off, or run `python -m data_tools index {shard}`"
        )


def header_at(entry: Entry) -> int:
    """Return where the header of a sample's first member begins, a block of tarfile.BLOCKSIZE bytes."""
    return max(0, min(offset for offset, _ in entry.members.values()) - tarfile.BLOCKSIZE)


def check_header(header: bytes, shard: object, entry: Entry) -> None:
    """Check that a tar has a sample where its index says: an index of another tar may fit its length.

    Raises:
        ShardError: there is another member, or none.
    """
    extension, (offset, size) = min(entry.members.items(), key=lambda member: member[1])
    name = f"{entry.key}.{extension}"
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        fits = found.size == size or size >= 8 << 30  # larger sizes and odd names stand in blocks of their own
        fits &= found.name.lower() == name.lower() or not name.isascii() or len(name) >= tarfile.LENGTH_NAME
    except tarfile.HeaderError:
        fits = False
    if not fits:
        raise ShardError(
            f"index of {shard}: says that {name!r} is at byte {offset}, which it is not; "
            f"run `python -m data_tools index {shard}`"
        )


def read_row(row: bytes) -> Entry:
    """Return the sample that one line of an index names.

    Raises:
        ValueError: the line is not of that form.
    """
    key, *cells = row.decode("ascii").split("\t")
    places = (cell.rsplit(":", 2) for cell in cells)
    members = {json.loads(f'"{ext}"') if "\\" in ext else ext: (int(at), int(size)) for ext, at, size in places}
    name = key[1:-1]
    if f'"{name}"' != key or not name.isprintable() or '"' in name or "\\" in name:  # nearly no key needs a parser
        name = json.loads(key)
    if not isinstance(name, str) or not all(0 <= at < 1 << 62 and 0 <= size < 1 << 62 for at, size in members.values()):
        raise ValueError(f"no key and places: {row!r:.100}")
    return Entry(name, members)


def read_index(shard: str | Path) -> list[Entry]:
    """Return the samples that a local shard's index names.

    Raises:
        ShardError: the index is broken or belongs to a tar of another length.
        FileNotFoundError: there is no index.
    """
    data = index_path(shard).read_bytes()
    check_index(data, shard, os.path.getsize(shard))
    _, *rows = data.removesuffix(b"\n").split(b"\n")
    try:
        return [read_row(row) for row in rows]
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"index {index_path(shard)}: not readable ({error}); run `python -m data_tools index {shard}`"
        ) from error


def write_atomic(path: Path, data: bytes, *, check: Callable[[], None] = lambda: None) -> None:
    """Write a file so that its final name never shows half of it, even after a power cut.

    `check` is called before it gets its name, and may raise.
    """
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")  # machines that share a disk may share a pid
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check()
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
        self._length = 0

    @property
    def listed(self) -> Listed:
        """What dataset.json is to say of the shard, once it is closed."""
        return len(self.entries), self._length, self._hash.hexdigest()

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
        self._length += len(data)

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


def write_manifest(folder: str | Path, counts: Mapping[str, tuple[int, int] | Listed], meta: Mapping[str, Any]) -> Path:
    """Write dataset.json; `counts` maps the name of a shard to (samples, bytes), and its SHA-256 where it is known."""
    shards = {name: dict(zip(("samples", "bytes", "sha256"), row)) for name, row in sorted(counts.items())}
    shards = {name: {key: value for key, value in row.items() if value != ""} for name, row in shards.items()}
    tree = {"version": VERSION, "shards": shards, "meta": dict(meta)}
    path = Path(folder) / MANIFEST
    write_atomic(path, json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")
    return path


def listed_in(folder: str | Path) -> dict[str, Listed]:
    """Return what the dataset.json of a folder says of its shards, as `write_manifest` takes it."""
    rows = read_manifest(folder)["shards"].items()
    return {name: (row["samples"], row["bytes"], str(row.get("sha256", ""))) for name, row in rows}


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        if tree["version"] != VERSION:
            raise ValueError(f"version {tree['version']!r}, expected {VERSION}")
        for name, counts in tree["shards"].items():
            samples, length = counts["samples"], counts["bytes"]
            if type(samples) is not int or type(length) is not int or not 0 <= samples <= length // tarfile.BLOCKSIZE:
                raise ValueError(f"{name!r} cannot hold {samples!r} samples in {length!r} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{where}: not a readable manifest ({error!r:.200}); run `python -m data_tools index`"
        ) from error
    return dict(tree)


def read_members(file: IO[bytes], entry: Entry) -> dict[str, bytes]:
    """Return the bytes of one sample from an open tar.

    Raises:
        CutOff: the tar ends before the member does, or the index is not its own.
    """
    out = {}
    for extension, (offset, size) in entry.members.items():
        if size > LARGE and offset + size > os.fstat(file.fileno()).st_size:
            raise CutOff(f"member {entry.key}.{extension}: bytes {offset} to {offset + size} lie outside the tar")
        data = os.pread(file.fileno(), size, offset)  # half the cost of seek and read
        if len(data) != size:
            raise CutOff(f"member {entry.key}.{extension}: {len(data)} of {size} bytes; the tar is cut off")
        out[extension] = data
    return out

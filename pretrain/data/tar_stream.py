"""One shard from its first byte to its last, for tars that can only be read forward, and what is wrong with them.

webdataset's own tar stage ends a shard without a word where its body was cut off between two members or a header is
damaged (tarfile takes both for the end of the archive). Here a shard ends with the mark that ends an archive, or with a
`Broken` that says at which byte. The last sample before it is not used: members of it may be missing.
"""

import contextlib
import gzip
import io
import tarfile
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.format import member_of
from pretrain.data.remote import Remote, Url
from pretrain.data.transports import base

CHUNK = 1 << 18
TRIES, PAUSE = 3, 1.0  # bodies without a new byte, and seconds before the second one; twice as long before the third


class Broken(Exception):
    """A shard that cannot be read to its end; the message says why and at which byte."""

    def __init__(self, reason: str, *, key: str = "") -> None:
        super().__init__(reason)
        self.key = key  #: the sample that was being read


class Sample(NamedTuple):
    """Neighbouring members of one key."""

    key: str
    fields: dict[str, bytes]  #: extension -> bytes
    reason: str = ""  #: why the sample cannot be used; empty: it can


def samples(source: Path | Url, *, retry_seconds: float = 0) -> Iterator[Sample]:
    """Yield the samples of a file, a URL or a `pipe:` command in file order; gzip is unpacked on the way.

    Members of a sample must be neighbours, as in every WebDataset. Member names are only split into key and extension.
    A server that does not answer is asked again for `retry_seconds`; a body that three times ends where it ended before
    is the shard's own fault.

    Raises:
        Broken: the shard is not there, is no tar, holds no sample, is cut off, or damaged.
        ShardError: its server cannot be reached.
    """
    current = Sample("", {})
    try:
        with _Body(source, retry_seconds) as body:
            for key, extension, data in _members(body):
                if key != current.key:
                    if current.fields:
                        yield current
                    current = Sample(key, {})
                if extension in current.fields:
                    current = current._replace(reason=f"two members are called {key}.{extension}")
                if data is None:
                    current = current._replace(reason=f"{key}.{extension} is a link, a device or sparse: no plain file")
                current.fields[extension] = data or b""
    except Broken as error:
        if error.key != current.key and error.key and current.fields:
            yield current  # the next one had begun
        error.key = error.key or current.key
        raise
    if not current.fields:
        raise Broken("it holds no samples")
    yield current


class _Body:
    """Bytes that can only be read forward, in the shape that TarFile wants; any failure of theirs is a Broken."""

    def __init__(self, source: Path | Url, retry_seconds: float) -> None:
        self.position = 0
        self.retry_seconds = retry_seconds
        self.last = b""  #: what the last read gave
        self.short = False  #: whether that was less than was asked for
        self.source = source

    def __enter__(self) -> "_Body":
        try:
            raw = (
                open(self.source, "rb", buffering=0)
                if isinstance(self.source, Path)
                else _Raw(self.source, self.retry_seconds)
            )
        except OSError as error:
            raise Broken(f"cannot be opened ({error.strerror})") from None
        self.raw: io.RawIOBase = raw
        packed = io.BufferedReader(raw, CHUNK)
        self.file: Any = packed
        try:
            if packed.peek(2)[:2] == b"\x1f\x8b":
                self.file = gzip.GzipFile(fileobj=packed)
        except BaseException:
            raw.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.raw.close()

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if size < 0:  # only a hostile header asks for that
            raise ValueError("a negative size")
        try:
            self.last = self.file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Broken(f"its gzip is cut off or damaged after byte {self.position} ({error})") from error
        self.position += len(self.last)
        self.short = len(self.last) < size
        return self.last

    def seek(self, position: int) -> None:
        """Go forward; the end of the body is no error here, as it is none for a file."""
        if position < self.position:
            raise ValueError("a negative size")
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass

    def finish(self) -> None:
        """Read the padding after the archive, so that a server or command can say whether all went well."""
        for _ in range(4):
            if not self.read(CHUNK):
                return


class _Raw(io.RawIOBase):
    """The bytes of a URL, in order."""

    def __init__(self, source: Url, retry_seconds: float) -> None:
        self.chunks = _chunks(source, Remote(retry_seconds))
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def close(self) -> None:
        self.chunks.close()
        super().close()


def _chunks(source: Url, server: Remote) -> Generator[bytes, None, None]:
    """Yield an object's bytes; after a break, go on where it broke, from its beginning where nothing else is served."""
    offset = failures = 0
    while True:
        try:
            stream = server.open(source, offset)
            with contextlib.closing(stream):
                skip = offset - stream.start
                for chunk in stream.chunks:
                    new, skip = chunk[skip:], max(0, skip - len(chunk))
                    if new:
                        offset, failures = offset + len(new), 0
                        yield new
            if stream.length is not None and offset < stream.length:
                raise base.Broken(f"the body has {offset} of {stream.length} bytes")
            return
        except base.Refused as error:
            raise Broken(f"cannot be read ({error})") from None
        except base.Broken as error:
            failures += 1
            if failures == TRIES:
                raise Broken(f"reading stopped after byte {offset} ({error})") from None
            time.sleep(PAUSE * 2 ** (failures - 1))


def _members(body: _Body) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield (key, extension, bytes) of the members that belong to samples, up to the checked end of the archive.

    What is no plain file has no bytes.
    """
    try:
        with tarfile.TarFile(fileobj=body, mode="r") as tar:  # type: ignore[arg-type]  # asks for read, seek and tell
            for member in tar:
                place = None if member.isdir() else member_of(member.name)
                if place is not None:
                    plain = member.isreg() and not member.issparse()
                    yield *place, _data(body, member, place[0]) if plain else None
                tar.members = []  # type: ignore[attr-defined]  # or it keeps a header a member
    except (tarfile.TarError, UnicodeError, ValueError, OverflowError) as error:
        if body.short and body.position:
            raise Broken(f"cut off at byte {body.position}") from error
        raise Broken(f"not a readable tar after byte {body.position} ({error})"[:300]) from error
    if body.short:
        raise Broken(f"cut off at byte {body.position}: the mark that ends an archive is missing")
    if body.last.strip(b"\0"):
        raise Broken(f"the header that ends at byte {body.position} is damaged")
    body.finish()


def _data(body: _Body, member: tarfile.TarInfo, key: str) -> bytes:
    try:
        body.seek(member.offset_data)
        data = body.read(member.size)
    except Broken as error:
        error.key = key
        raise
    if len(data) < member.size:
        raise Broken(f"cut off at byte {body.position} of member {member.name!r}", key=key)
    return data

"""One shard from its first byte to its last, for tars that can only be read forward, and what is wrong with them.

webdataset's own tar stage ends a shard without a word where its body was cut off between two members or a header is
damaged (tarfile takes both for the end of the archive). Here a shard ends with the mark that ends an archive, or with a
`Broken` that says at which byte. The last sample before it is not used: members of it may be missing.
"""

import gzip
import io
import os
import re
import signal
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import fsspec

from pretrain.data.format import split_name

SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")
CHUNK = 1 << 18
CONNECT_SECONDS, STALL_SECONDS = 30, 60


class Broken(Exception):
    """A shard that cannot be read to its end; the message says why and at which byte."""

    def __init__(self, reason: str, *, key: str = "", again: bool = False) -> None:
        super().__init__(reason)
        self.key = key  #: the sample that was being read
        self.again = again  #: whether another attempt may go better


class Sample(NamedTuple):
    """Neighbouring members of one key."""

    key: str
    fields: dict[str, bytes]  #: extension -> bytes
    reason: str = ""  #: why the sample cannot be used; empty: it can


def samples(url: str) -> Iterator[Sample]:
    """Yield the samples of a local path, a URL or a `pipe:` command in file order; gzip is unpacked on the way.

    Members of a sample must be neighbours, as in every WebDataset. Member names are only split into key and extension.

    Raises:
        Broken: the shard cannot be opened, is no tar, holds no sample, is cut off, or damaged.
    """
    current = Sample("", {})
    try:
        with _open(url) as body:
            body.unpack()
            for key, extension, data in _members(body):
                if key != current.key:
                    if current.fields:
                        yield current
                    current = Sample(key, {})
                if extension in current.fields:
                    current = current._replace(reason=f"two members are called {key}.{extension}")
                current.fields[extension] = data
            body.finish()
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

    def __init__(self, file: Any, process: subprocess.Popen[bytes] | None = None) -> None:
        self.position = 0
        self.last = b""  #: what the last read gave
        self.short = False  #: whether that was less than was asked for
        self.process = process
        self.source = file
        self.file: io.BufferedIOBase = io.BufferedReader(_Raw(file), CHUNK)

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.source.close()
        if self.process is not None and self._end(self.process) > 0 and isinstance(error, Broken):
            reason = f"{error}; its command ended with exit code {self.process.returncode}"
            raise Broken(reason, key=error.key, again=True)

    def unpack(self) -> None:
        """Look whether the bytes are gzip; if they are, `read` gives what is inside."""
        packed = self.file
        assert isinstance(packed, io.BufferedReader)
        if self._guard(lambda: packed.peek(2)[:2]) == b"\x1f\x8b":
            self.file = gzip.GzipFile(fileobj=packed)

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if size < 0:  # only a hostile header asks for that
            raise ValueError("a negative size")
        self.last = self._guard(lambda: self.file.read(size))
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
        """Read the padding after the archive, so that the transport and a command can say whether all went well."""
        for _ in range(4):
            if not self.read(CHUNK):
                if self.process is not None and self.process.wait():
                    raise Broken("the archive itself ends well")
                return

    def _guard(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = f"its gzip is cut off or damaged after byte {self.position} ({error})"
            raise Broken(reason, again=True) from error
        except Exception as error:  # backends of fsspec raise nearly anything when a connection fails
            raise Broken(f"reading stopped after byte {self.position} ({_said(error)})", again=True) from error

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> int:
        """Return the exit code; a command that still wants to write is killed with all that it has started."""
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a worker blocks SIGTERM, and so does what it starts
            return process.wait()


class _Raw(io.RawIOBase):
    """A file object of any backend as a raw stream."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _members(body: _Body) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, extension, bytes) of the members that belong to samples, up to the checked end of the archive."""
    try:
        with tarfile.TarFile(fileobj=body, mode="r") as tar:  # type: ignore[arg-type]  # asks for read, seek and tell
            for member in tar:
                key, extension = split_name(member.name)
                if member.isfile() and extension and not member.name.rpartition("/")[2].startswith("."):
                    yield key, extension, _data(body, member, key)
                tar.members = []  # type: ignore[attr-defined]  # or it keeps a header a member
    except (tarfile.TarError, UnicodeError, ValueError, OverflowError) as error:
        if body.short and body.position:
            raise Broken(f"cut off at byte {body.position}", again=True) from error
        raise Broken(f"not a readable tar after byte {body.position} ({error})"[:300]) from error
    if body.short:
        raise Broken(f"cut off at byte {body.position}: the mark that ends an archive is missing", again=True)
    if body.last.strip(b"\0"):
        raise Broken(f"the header that ends at byte {body.position} is damaged")


def _data(body: _Body, member: tarfile.TarInfo, key: str) -> bytes:
    try:
        body.seek(member.offset_data)
        data = body.read(member.size)
    except Broken as error:
        error.key = key
        raise
    if len(data) < member.size:
        raise Broken(f"cut off at byte {body.position} of member {member.name!r}", key=key, again=True)
    return data


def _open(url: str) -> _Body:
    try:
        if url.startswith("pipe:"):
            command = ["bash", "-o", "pipefail", "-c", url.removeprefix("pipe:")]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)  # noqa: S603
            return _Body(process.stdout, process)
        if not SCHEME.match(url):
            return _Body(open(os.path.expanduser(url), "rb"))
        if url.startswith(("http:", "https:")):
            return _open_http(url)
        return _Body(fsspec.open(url, "rb").open())
    except Broken:
        raise
    except Exception as error:  # backends of fsspec raise nearly anything
        status = getattr(error, "status", None) or 0
        gone = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ImportError))
        hopeless = gone or (400 <= status < 500 and status not in (408, 429))
        raise Broken(f"cannot be opened ({_said(error)})", again=not hopeless) from error


def _open_http(url: str) -> _Body:
    """Open with one GET: no HEAD and no range is asked of the server."""
    import aiohttp  # only who reads over HTTP needs it

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
    system = fsspec.filesystem("http", client_kwargs={"timeout": timeout})
    return _Body(system.open(url, "rb", block_size=0, size=1))  # a size, or it would ask for one first


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")[:200]

"""Objects by URL: which may be read, by which transport, and how often it is tried before a run stops."""

import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from pydantic import Field

from pretrain.config import ConfigError, Section
from pretrain.data.decode import MAX_PIXELS
from pretrain.data.format import ShardError
from pretrain.data.transports import base, filesystem, http, pipe
from pretrain.dist import hash64

FIRST_PAUSE = 0.25  # seconds; doubles with each try
LONGEST_PAUSE = 30
TRIES_OF_WRONG = 3  # whole bodies that are not what they should be: another try is a courtesy
# schemes that lead on to other files or start programs: what they do is not written in the URL
INDIRECT = {
    "async_wrapper", "asyncwrapper", "asynclocal", "blockcache", "cached", "dask", "data", "dir", "dvc", "filecache",
    "generic", "git", "jlab", "jupyter", "libarchive", "pyscript", "reference", "simplecache", "tar", "zip",
}  # fmt: skip
_SETTING = re.compile(r"\w+=")  # NAME=value before a command
_SECRET = re.compile(r"(?i)sig|token|secret|credential|password|passwd|key|auth")
_PLAIN = "/{},!*()'"  # as names in a list have them, braces to be expanded among them
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")

log = logging.getLogger("diptych")
T = TypeVar("T")
Passing = type[base.Refused] | tuple[()]  # what the caller wants to see itself


class Access(Section):
    """How shards are read wherever they lie: keys of `data:`, of every eval and of `encode`."""

    cache_dir: str | None = None  #: none: $DIPTYCH_CACHE, else ~/.cache/diptych; best on a disk of the node itself
    cache_gb: float = Field(default=50, gt=0)  #: at most so much (10^9 bytes) lies there, unfinished downloads included
    range_reads: bool = False  #: read single samples over the network and cache no shards
    retry_seconds: float = Field(default=300, ge=0)  #: without progress for so long, the run stops
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)  #: larger images are unusable; read from the header
    allow_pipe: bool = False  #: let shards be commands (pipe:) and chains of URLs (a::b), which may run programs


@dataclass(frozen=True)
class Url:
    """An object that is not a local file. As text, what is secret in it is left out; `text` is the whole."""

    text: str

    def __str__(self) -> str:
        """Return the URL as logs may show it."""
        return self.shown

    @cached_property
    def shown(self) -> str:
        """The URL without what is secret."""
        if self.scheme in pipe.SCHEMES:  # a command may carry a token anywhere: its program and what it fetches
            words = self.text.partition(":")[2].split()
            program = next((word for word in words if not _SETTING.match(word)), "")  # NAME=value before it may be one
            return f"pipe:{program} ... {self.name}"
        if "::" in self.text:
            return "::".join(Url(link).shown for link in self.text.split("::"))
        parts = urlsplit(self.text)
        query = [(k, "..." if _SECRET.search(k) else v) for k, v in parse_qsl(parts.query, keep_blank_values=True)]
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, urlencode(query, safe="/:."), ""))

    @cached_property
    def scheme(self) -> str:
        """The scheme, in lower case."""
        return self.text.partition(":")[0].lower()

    @cached_property
    def name(self) -> str:
        """The shard's base name: equal to the local file's, so that a data set that moved gives the same draws."""
        if self.scheme in pipe.SCHEMES:
            found = re.findall(r"[^\s/\"'=;|&<>()]+\.tar\b", self.text)
            digest = hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()
            return str(found[-1]) if found else digest
        path = unquote(urlsplit(self.text).path) if self.scheme in http.SCHEMES else self.text
        return path.rpartition("/")[2]

    def sibling(self, name: str) -> "Url | None":
        """Return the object of another name in the same folder; None where there are no folders."""
        if self.scheme in pipe.SCHEMES or "::" in self.text:
            return None
        if self.scheme not in http.SCHEMES:
            return Url(f"{self.text.rpartition('/')[0]}/{name}")
        parts = urlsplit(self.text)
        return Url(urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name, safe=_PLAIN)}")))

    @property
    def index(self) -> "Url | None":
        """The index beside a shard."""
        return self.sibling(PurePosixPath(self.name).stem + ".idx")


def scheme(word: str) -> str:
    """Return the scheme of a word in lower case, empty where it is a path."""
    found = _SCHEME.match(word)
    return found[1].lower() if found else ""


def shown(word: str) -> str:
    """Return a path, URL or command as a message may show it."""
    return Url(word).shown if scheme(word) else word


def url(word: str, *, allow_pipe: bool) -> Url:
    """Return a word that has a scheme as a Url.

    Raises:
        ConfigError: an unknown scheme, one whose library is missing, or one that may run programs and is not allowed.
    """
    kind = scheme(word)
    runs = kind in pipe.SCHEMES or "::" in word or kind in INDIRECT
    if runs and not allow_pipe:
        raise ConfigError(
            f"data.shards: {shown(word)!r} is a pipe or a chain of URLs, which may run programs on this machine; "
            "if you wrote it yourself and mean it, set data.allow_pipe=true"
        )
    if kind not in (*pipe.SCHEMES, *http.SCHEMES):
        for link in word.split("::"):
            link_kind = scheme(link) or link
            if link_kind not in filesystem.schemes():
                raise ConfigError(
                    f"data.shards: {shown(word)!r} starts with {link_kind!r}, which is no scheme that can be read; "
                    "known are http, https, s3, gs, az, hf, sftp and whatever else fsspec knows"
                )
            filesystem.check(link_kind)
    return Url(word)


class Sink(Protocol):
    """Where a download goes."""

    offset: int

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def restart(self) -> None:
        """Forget all bytes."""


class Remote:
    """Reads objects and tries again where that may help. Cheap to copy to another process."""

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds

    def length(self, source: Url) -> int | None:
        """Return the bytes of an object, None where only reading it tells.

        Raises:
            ShardError: it cannot be read.
        """

        if source.scheme in pipe.SCHEMES:
            return None  # without running the command for it

        def ask() -> int | None:
            stream = transport(source).open(source.text, 0)
            stream.close()
            return stream.length

        return self._persist(source, ask)

    def optional(self, source: Url, flaw: Callable[[bytes], str] = lambda _: "") -> bytes | None:
        """Return a small object whole, None where there is none or it may not be seen.

        `flaw` says what is wrong with a body: a proxy that cuts one may give it the length of what is left.

        Raises:
            ShardError: there may be one, but it cannot be read.
        """

        def ask() -> bytes:
            stream = transport(source).open(source.text, 0)
            try:
                data = b"".join(stream.chunks)
            finally:
                stream.close()
            if stream.length is not None and len(data) != stream.length:
                raise base.Broken(f"the body has {len(data)} of {stream.length} bytes")
            if wrong := flaw(data):
                raise base.Broken(wrong, tries=TRIES_OF_WRONG)
            return data

        try:
            return self._persist(source, ask, passing=base.Missing)
        except base.Missing:
            return None

    def open(self, source: Url, start: int) -> base.Stream:
        """Return an object as a stream from byte `start` on, or from its beginning where nothing else is served.

        Raises:
            Refused: it is not there, or may not be read.
            ShardError: it cannot be opened.
        """
        return self._persist(source, lambda: transport(source).open(source.text, start), passing=base.Refused)

    def read(self, source: Url, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of an object.

        Raises:
            ShardError: they cannot be read.
        """
        return self._persist(source, lambda: transport(source).read(source.text, start, stop))

    def fill(self, source: Url, sink: Sink, *, length: int | None, sha256: str = "") -> None:
        """Write an object whole and checked into a sink; after a break, go on where it broke if the server can.

        Raises:
            ShardError: it cannot be read, or it is not of that length or checksum.
        """
        body = _Body(source, sink, length, sha256)
        self._persist(source, body.attempt, reached=lambda: sink.offset)

    def _persist(
        self, source: Url, act: Callable[[], T], *, reached: Callable[[], int] = lambda: 0, passing: Passing = ()
    ) -> T:
        tries, streak, wrong, best, since = 0, 0, 0, 0, time.monotonic()
        while True:
            tries += 1
            try:
                return act()
            except base.Refused as error:
                if isinstance(error, passing):
                    raise
                raise ShardError(
                    f"shard {source}: {error}; check data.shards, its braces and your rights there"
                ) from None
            except base.Broken as error:
                if reached() > best:
                    best, streak, since = reached(), 0, time.monotonic()
                # spread over ranks by what they read, not by chance: the same run waits the same
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**streak) * (0.5 + hash64(source.text, tries) / 2**64)
                pause = max(pause, min(error.wait, LONGEST_PAUSE))
                streak += 1
                wrong += error.tries is not None
                if time.monotonic() + pause - since > self.retry_seconds or (error.tries and wrong >= error.tries):
                    waited = f"{tries} tries, {time.monotonic() - since:.0f} s without progress"
                    raise ShardError(
                        f"shard {source}: {error}; gave up after {waited}. "
                        "When it can be read again, start the same command: it goes on"
                    ) from None
                if tries & (tries - 1) == 0:  # the 1st, 2nd, 4th, 8th: many threads may meet the same trouble
                    log.warning("%s: %s; try %d, again in %.1f s", source, error, tries, pause)
                time.sleep(pause)


class _Body:
    """One download over all its tries: what has arrived, and what it should be."""

    def __init__(self, source: Url, sink: Sink, length: int | None, sha256: str) -> None:
        self.source, self.sink, self.length, self.sha256 = source, sink, length, sha256
        self.refuted: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self.sha, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.sink.restart()

    def attempt(self) -> None:
        """Read on from where the last try ended."""
        stream = transport(self.source).open(self.source.text, self.sink.offset)
        try:
            expected = self.length if self.length is not None else stream.length
            if stream.length not in (None, expected):
                raise base.Broken(f"it has {stream.length} bytes, expected {expected}", tries=TRIES_OF_WRONG)
            if stream.start != self.sink.offset:
                self._clear()
            for chunk in stream.chunks:
                if expected is not None and self.sink.offset + len(chunk) > expected:
                    self._clear()
                    raise base.Broken(f"more than the expected {expected} bytes arrive", tries=TRIES_OF_WRONG)
                if self.sha256:
                    self.sha.update(chunk)
                if stream.md5:
                    self.md5.update(chunk)
                self.sink.write(chunk)
        finally:
            stream.close()
        if expected is not None and self.sink.offset != expected:
            raise base.Broken(f"the body ended after {self.sink.offset} of {expected} bytes")
        self._verify(stream.md5)

    def _verify(self, md5: str) -> None:
        if self.sha256 and self.sha.hexdigest() != self.sha256:
            self._clear()
            raise base.Broken("its SHA-256 is not the one in dataset.json", tries=TRIES_OF_WRONG)
        got = self.md5.hexdigest()
        # a store that encrypts with keys of its own gives an ETag that only looks like an MD5:
        # what arrives twice alike was not damaged on the way
        if md5 and not self.sha256 and got != md5 and got not in self.refuted:
            self.refuted.add(got)
            self._clear()
            raise base.Broken(f"its MD5 is {got}, the server says {md5}")


def transport(source: Url) -> base.Transport:
    """Return what opens a URL, without trying again."""
    if source.scheme in http.SCHEMES:
        return http.Transport()
    if source.scheme in pipe.SCHEMES:
        return pipe.Transport()
    return filesystem.Transport()

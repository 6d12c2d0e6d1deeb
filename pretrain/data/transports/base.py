"""What a transport is: it opens URLs of some schemes as streams of bytes, and says why it cannot."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

CHUNK = 1 << 20
CONNECT_SECONDS = 10  # without an answer to the first packet
STALL_SECONDS = 30  # without a byte


class Refused(Exception):
    """What another try would not change: no such object, no permission, no such host name in the certificate."""


class Missing(Refused):
    """There is nothing of that name, or it may not be seen: stores answer 403 instead of 404 to who may not list."""


class Broken(Exception):
    """What another try may change: a busy server, a dropped connection, a short body."""

    def __init__(self, reason: str, *, wait: float = 0, tries: int | None = None) -> None:
        super().__init__(reason)
        self.wait = wait  #: seconds that the server asks for
        self.tries = tries  #: so many of these in all, whatever the deadline


@dataclass
class Stream:
    """An object that is being read."""

    start: int  #: where the chunks begin; 0 where the server serves no ranges
    length: int | None  #: of the whole object; None where nobody says
    md5: str  #: of the whole object in hex digits; empty where nobody says
    chunks: Iterator[bytes]
    close: Callable[[], None]


class Transport:
    """Base of every transport. Methods raise Refused or Broken."""

    ranges = True  #: whether parts of an object can be asked for

    def open(self, url: str, start: int) -> Stream:
        """Return the bytes of an object from `start` on, or from 0 on where only the whole is served."""
        raise NotImplementedError

    def read(self, url: str, start: int, stop: int) -> bytes:
        """Return exactly the bytes [start, stop)."""
        raise NotImplementedError

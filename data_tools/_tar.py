"""An open shard, of which single bytes can be asked: the head of an image, its captions, all of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_tools._captions import captions_of
from data_tools._header import header_of
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.format import Entry, ShardError

WORDS = ("txt", "json")  # members in which captions are

Place = tuple[int, int]  #: (offset, number of bytes) in the tar


class Picture(NamedTuple):
    """What the header of a sample's image says."""

    kind: str
    width: int
    height: int
    bytes: int


class Tar:
    """Reads one shard by place."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def read(self, place: Place) -> bytes:
        """Return the bytes at a place.

        Raises:
            ShardError: the tar ends before that.
        """
        data = os.pread(self._descriptor, place[1], place[0])
        while len(data) < place[1]:  # one call gives 2 GiB at most
            more = os.pread(self._descriptor, place[1] - len(data), place[0] + len(data))
            if not more:
                raise ShardError(f"shard {self.path}: is cut off inside a sample; fetch or build it again")
            data += more
        return data

    def picture(self, entry: Entry) -> Picture:
        """Return what an image's header says.

        Raises:
            BadSample: there is no image, or its header cannot be read.
        """
        offset, size = image_of(entry)
        return Picture(*header_of(lambda at, number: self.read((offset + at, number)), size), size)

    def captions(self, entry: Entry) -> list[str]:
        """Return the captions of a sample.

        Raises:
            BadSample: it has none that can be used.
        """
        found = captions_of({name: self.read(entry.members[name]) for name in WORDS if name in entry.members})
        try:
            "".join(found).encode()
        except UnicodeEncodeError:
            raise BadSample("caption holds half a surrogate pair, which is no text") from None
        return found

    def image(self, entry: Entry) -> bytes:
        """Return the encoded image of a sample.

        Raises:
            BadSample: it has none.
        """
        return self.read(image_of(entry))


@contextmanager
def opened(path: Path) -> Iterator[Tar]:
    """Yield an open shard."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"shard {path}: cannot be read ({error.strerror})") from None
    try:
        yield Tar(path, descriptor)
    finally:
        os.close(descriptor)


def image_of(entry: Entry) -> Place:
    """Return where a sample's image lies.

    Raises:
        BadSample: it has none.
    """
    for name in IMAGES:
        if name in entry.members:
            return entry.members[name]
    raise BadSample("no image member")

"""What a source is: rows of pictures and captions, in an order that only depends on what is there.

A source is one module: `claims(path)` says whether a path looks like its kind, `rows(path, options)` yields its rows,
`count(path, options)` says about how many, cheaply, for the progress bar. Bytes of pictures are read late: a row only
knows where they are.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pretrain.config import ConfigError
from pretrain.data.decode import IMAGES, BadSample
from pretrain.registry import nearest

_BASE64 = re.compile(r"(?:data:image/[a-z+.-]+;base64,)?[A-Za-z0-9+/_-]{32,}={0,2}\s*")
_LOOK = 128  # characters
_LINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_STARTS = ("/9j/", "_9j_", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "data:image/")  # of known formats
_COUNTED = 64 * 1024 * 1024  # bytes of a text file whose lines are really counted


class Blob(Protocol):
    """Bytes that lie somewhere until they are asked for; its text is a path, for people."""

    def read(self) -> bytes:
        """Return the bytes; raise BadSample where they cannot be had."""
        ...

    def stamp(self) -> tuple:
        """Return what is different when the bytes are, without reading more than needed."""
        ...


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A whole file."""

    path: Path

    def read(self) -> bytes:
        """Return the file's bytes."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise BadSample("image file is missing") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise BadSample(f"image file cannot be read ({getattr(error, 'strerror', error)})") from error

    def stamp(self) -> tuple:
        """Return size and time, which is what a changed file changes."""
        try:
            stat = self.path.stat()
        except (OSError, ValueError):
            return (str(self.path),)
        return (str(self.path), stat.st_size, stat.st_mtime_ns)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class PartBlob:
    """A stretch of a file: a member of a tar."""

    path: Path
    offset: int
    size: int
    changed: int = 0  #: modification time of the file in nanoseconds

    def read(self) -> bytes:
        """Return the stretch."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise BadSample(f"{self.path.name} ends before the member does")
        return data

    def stamp(self) -> tuple:
        """Return where the stretch lies and the time of the file."""
        return (self.path.name, self.offset, self.size, self.changed)

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class InlineBlob:
    """Bytes that came with the row."""

    data: bytes

    def read(self) -> bytes:
        """Return them."""
        return self.data

    def stamp(self) -> tuple:
        """Return their hash."""
        return (sha256(self.data).hexdigest(),)

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Base64Blob:
    """Bytes that came with the row as base64, in the usual or the URL alphabet, with or without padding."""

    text: str

    def read(self) -> bytes:
        """Return what the text stands for."""
        text = self.text.partition(",")[2] if self.text.startswith("data:") else self.text
        text = text.strip().rstrip("=")
        if "-" in text or "_" in text:
            text = text.replace("-", "+").replace("_", "/")
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadSample(f"base64 of the image is damaged ({error})") from error

    def stamp(self) -> tuple:
        """Return the hash of the text."""
        return (sha256(self.text.encode(errors="surrogateescape")).hexdigest(),)

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class LinkBlob:
    """Bytes that lie on another machine; only `data_tools fetch` goes there."""

    url: str

    def read(self) -> bytes:
        """Refuse."""
        raise BadSample("image is a URL; `python -m data_tools fetch` downloads a table of URLs into shards")

    def stamp(self) -> tuple:
        """Return the URL."""
        return (self.url,)

    def __str__(self) -> str:
        return self.url


class Row(NamedTuple):
    """One pair before its image is read."""

    number: int  #: place in the source, bad rows counted: the key, stable when another row is mended
    where: str  #: for people: file or line
    image: Blob | None
    captions: list[str]
    record: dict[str, Any]  #: everything else that the source says
    problem: str = ""  #: why this row is no sample, as far as known without the image
    others: Mapping[str, Blob] = {}  #: further members of the sample, copied as they are
    wordless: bool = False  #: a sample without caption is one all the same (boxes, questions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a source is to be read; most options speak of tables only."""

    image: str | None = None  #: column or key of the image; None: what the kind calls it
    caption: str | None = None  #: likewise of the caption
    columns: tuple[str, ...] = ()  #: names of the columns of a table without header
    headerless: bool = False  #: the first line of a table is a row
    separator: str | None = None  #: None: a tab in .tsv, else a comma
    quotes: bool | None = None  #: whether cells may be quoted; None: unless a headerless table holds base64
    base64: bool = False  #: image cells are base64, whatever they look like
    wordless: bool = False  #: rows without caption are samples
    root: Path | None = None  #: what relative image paths start from; None: the source's folder
    boxes: Path | None = None  #: COCO: the instances file that belongs to a captions file
    leave_out: Path = field(default_factory=lambda: Path("."))  #: the output folder, which is no source


def layout(folder: Path) -> str:
    """Return what a folder holds at its top: "tars", "parquet" (and no folders of pictures), else "pairs"."""
    with os.scandir(folder) as entries:  # a flat folder may hold millions
        shown = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    suffixes = {os.path.splitext(name)[1].lower() for name, is_folder in shown if not is_folder}
    if ".tar" in suffixes:
        return "tars"
    pictures = any(is_folder for _, is_folder in shown) or bool(suffixes & {f".{kind}" for kind in IMAGES})
    return "parquet" if ".parquet" in suffixes and not pictures else "pairs"


def is_base64(cell: str) -> bool:
    """Return whether a cell is an encoded picture rather than a path; only its beginning is looked at closely."""
    if len(cell) < 40 or not cell.startswith(_STARTS) or "." in cell:
        return False
    return _BASE64.fullmatch(cell[:_LOOK]) is not None


def picture(cell: Any, root: Path, options: Options) -> Blob | None:
    """Return the picture that a cell names or holds; None where it does neither."""
    if isinstance(cell, bytes):
        return InlineBlob(cell) if cell else None
    if not isinstance(cell, str) or not cell.strip() or "\0" in cell:
        return None
    if options.base64 or is_base64(cell):
        return Base64Blob(cell)
    if _LINK.match(cell.strip()):
        return LinkBlob(cell.strip())
    return FileBlob((options.root or root) / cell.strip())


def different(captions: list[str]) -> list[str]:
    """Return captions without repetition and empty ones."""
    return [caption for caption in dict.fromkeys(captions) if caption]


def column_of(wanted: str | None, usual: tuple[str, ...], known: list[str], source: Path, option: str) -> int:
    """Return the number of a column that is given by name, by number, or, if at all not, by what is usual.

    Raises:
        ConfigError: there is no such column; the message lists those that are there.
    """
    for name in (wanted,) if wanted is not None else usual:
        if name in known:
            return known.index(name)
        if wanted is not None and wanted.removeprefix("-").isdecimal() and -len(known) <= int(wanted) < len(known):
            return int(wanted) % len(known)
    name = usual[0] if wanted is None else wanted
    raise ConfigError(
        f"source {source}: no column {name!r}.{nearest(name, known)} It has: {', '.join(map(repr, known))}; "
        f"name another with {option} (a name, or a number: 0 is the first, -1 the last)"
    )


def count_lines(path: Path) -> int:
    """Return the number of lines of a text file; of a large one, as many as its beginning lets expect."""
    size, seen, lines = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while seen < _COUNTED and (block := file.read(1 << 20)):
            seen, lines = seen + len(block), lines + block.count(b"\n")
    return lines if seen >= size else lines * size // max(seen, 1)

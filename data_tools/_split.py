"""The shards of one split while a source is walked: what is there is kept, the rest is written.

Each finished shard leaves a note: how many rows of the source it took and a digest of them. The next run first walks
the source and compares; shards whose rows have not changed are kept, from the first changed one on all are written
anew.
"""

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from data_tools._header import read_header
from data_tools.sources.base import Row
from pretrain.data import format as shards
from pretrain.data.decode import BadSample


class Note(NamedTuple):
    """What is remembered of one finished shard."""

    name: str
    rows: int
    digest: str
    samples: int
    bytes: int
    bad: list[dict[str, str]]
    sha256: str = ""  #: empty where an older version has left the note


def key_of(row: Row) -> str:
    """Return the key of a row's sample."""
    return f"{row.number:08d}"


def members_of(row: Row) -> dict[str, bytes]:
    """Return the members of a row's sample; only the image's header is looked at.

    Raises:
        BadSample: the row is no sample; the message is what quarantine.jsonl shows.
    """
    if row.problem:
        raise BadSample(row.problem)
    if not row.captions and not row.wordless:
        raise BadSample("caption is empty")
    assert row.image is not None, "a row without image has a problem"
    data = row.image.read()
    extension, _, _ = read_header(data)
    members = {extension: data}
    try:
        if row.captions:
            members["txt"] = row.captions[0].encode()
        if record := as_json(row):
            members["json"] = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # half a surrogate pair, or a number that is none
        raise BadSample(f"text or number that JSON cannot hold ({error})") from error
    return {**{name: blob.read() for name, blob in row.others.items()}, **members}


def as_json(row: Row) -> dict[str, Any]:
    """Return what the json member of a row's sample holds: all that the source says, and its captions if several."""
    own = {"captions": row.captions} if len(row.captions) > 1 else {}
    return {**row.record, **own}


class Split:
    """One split. First `compare` sees all rows in order, then `settle`, then `take` sees them again, then `finish`.

    Use as a context manager: an exception inside leaves no unfinished shard behind.
    """

    def __init__(self, out: Path, state: Path, name: str, *, shard_size: int) -> None:
        self.out, self.state, self.name, self.shard_size = out, state, name, shard_size
        self.notes: list[Note] = []  #: of the shards that are kept, later of those written too
        self.doubtful = self._read_note(0) is not None  #: whether comparing more rows can change anything
        self._old: Note | None = None  #: the note that rows are being compared with
        self._skip = 0  #: rows of kept shards that `take` has still to pass
        self._writer: shards.ShardWriter | None = None
        self._begin()

    def compare(self, row: Row) -> None:
        """Hold a row against the notes of an earlier run."""
        if not self.doubtful:
            return
        if self._old is None:
            self._begin()
            self._old = self._read_note(len(self.notes))
            if self.notes and self.notes[-1].samples < self.shard_size:  # a short shard was the last; it no longer is
                self.notes.pop()
                self._old = None
        if self._old is None:
            self.doubtful = False
            return
        self._count(row)
        if self._rows == self._old.rows:
            self.doubtful = self._digest.hexdigest() == self._old.digest
            if self.doubtful:
                self.notes.append(self._old)
            self._old = None

    def settle(self) -> None:
        """Go over to writing: what the notes hold now is kept."""
        self.doubtful, self._old = False, None
        self._skip = sum(note.rows for note in self.notes)
        self._begin()

    def take(self, row: Row) -> None:
        """Write a row, unless it lies in a shard that is kept."""
        if self._skip:
            self._skip -= 1
            return
        if self._writer is None:
            self._writer = shards.ShardWriter(self.out / self._shard(len(self.notes)))
        self._count(row)
        try:
            self._writer.add(key_of(row), members_of(row))
        except BadSample as error:
            image = "" if row.image is None else str(row.image)
            self._bad.append({"key": key_of(row), "where": row.where, "image": image, "reason": str(error)})
        if len(self._writer.entries) == self.shard_size:
            self._end()

    def finish(self) -> list[Note]:
        """Close the last shard, remove those that an earlier build of a longer source left, and return all notes."""
        if self._rows:
            self._end()
        number = sum(1 for note in self.notes if note.samples)
        while (self.state / f"{self._shard(number)}.json").exists():
            path = self.out / self._shard(number)
            for stale in (path, shards.index_path(path), self.state / f"{path.name}.json"):
                stale.unlink(missing_ok=True)
            number += 1
        return self.notes

    def _begin(self) -> None:
        self._rows, self._bad = 0, list[dict[str, str]]()
        self._digest = hashlib.sha256(str(self.shard_size).encode())

    def _count(self, row: Row) -> None:
        """Add a row, and what a changed picture changes, to the digest of its shard."""
        stamps = [blob.stamp() for blob in (row.image, *row.others.values()) if blob is not None]
        parts = (row.number, row.where, row.captions, row.record, row.problem, list(row.others), row.wordless, stamps)
        self._digest.update(repr(parts).encode(errors="surrogateescape"))
        self._rows += 1

    def _end(self) -> None:
        """Finish a shard and leave its note; rows that are all bad leave none, they are looked at again next time."""
        assert self._writer is not None, "there are rows"
        writer, self._writer = self._writer, None
        samples, name = len(writer.entries), self._shard(len(self.notes))
        (writer.close if samples else writer.abort)()
        _, size, sha256 = writer.listed if samples else (0, 0, "")
        note = Note(name, self._rows, self._digest.hexdigest(), samples, size, self._bad, sha256)
        if samples:
            shards.write_atomic(self.state / f"{name}.json", json.dumps(note._asdict()).encode())
        self.notes.append(note)
        self._begin()

    def _shard(self, number: int) -> str:
        return f"{self.name}-{number:05d}.tar"

    def _read_note(self, number: int) -> Note | None:
        """Return the note of a finished shard, if its tar and index are still what the note says."""
        name = self._shard(number)
        try:
            note = Note(**json.loads((self.state / f"{name}.json").read_bytes()))
            size, samples = (self.out / name).stat().st_size, len(shards.read_index(self.out / name))
        except (OSError, ValueError, TypeError):
            return None
        return note if (size, samples) == (note.bytes, note.samples) else None

    def __enter__(self) -> "Split":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.abort()

"""A parquet of what a model says about samples, one row a sample, named by (shard base name, key).

    shard, key     string
    image, text    fixed-size list of float16, unit norm        (features)
    score          float32, cosine of picture and caption       (scores; of several captions the mean)
    score_max      float32, the best caption's
    captions       int32, how many there were
    codes          fixed-size list of uint16, in raster order   (codes)

The file's metadata holds, under `diptych`, a JSON object: which weights, transform, tokenizer and reader it came from.
Whoever writes it works shard by shard: a part is under its name when it is whole, and the parts are merged in the order
of the shards, so that a killed run goes on and the result does not know who wrote which part.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pretrain.dist import hash64

MARK = b"diptych"
Columns = Mapping[str, Sequence[str] | NDArray[Any]]


class FeatureTable:
    """The file at `path` and the folder beside it that holds its parts until it is whole.

    `about` says where all rows come from; `names` and `identities` are each shard's base name and a word that changes
    when the shard does.
    """

    def __init__(self, path: str | Path, *, about: Mapping[str, Any], identities: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.parts = self.path.with_name(f"{self.path.name}.parts")
        self.bad = self.path.with_name(f"{self.path.name}.bad.jsonl")
        self.about = dict(about)
        self.identities = dict(identities)
        self._whole = json.dumps({**self.about, "shards": hash64(json.dumps(self.identities))}, sort_keys=True)

    def missing(self) -> list[int] | None:
        """Return the shards, by number, that have no part yet, or one of other weights, options or bytes.

        None: the file itself is there, of these shards and all else.
        """
        if _mark(self.path) == self._whole:
            shutil.rmtree(self.parts, ignore_errors=True)  # a kill may have come between the two
            return None
        return [n for n, name in enumerate(self.identities) if _mark(self._part(n)) != self._of(name)]

    def write_part(self, number: int, columns: Columns, bad: Sequence[Mapping[str, str]]) -> None:
        """Keep the rows of one shard and the samples of it that could not be used."""
        name = list(self.identities)[number]
        named = {"shard": [name] * len(columns["key"]), **columns}
        table = pa.table({key: _column(values) for key, values in named.items()})
        marks = {MARK: self._of(name).encode(), b"bad": json.dumps(list(bad)).encode()}
        self.parts.mkdir(parents=True, exist_ok=True)
        hidden = self.parts / f".{number:06d}.{os.getpid()}.tmp"
        pq.write_table(table.replace_schema_metadata(marks), hidden)
        _publish(hidden, self._part(number))

    def merge(self) -> tuple[int, int]:
        """Join all parts, list what could not be used beside the file, and return how many rows and how many not."""
        hidden, rows, lines = self.parts / ".whole.tmp", 0, []
        writer = None
        for number in range(len(self.identities)):
            table = pq.read_table(self._part(number))
            lines += json.loads(table.schema.metadata[b"bad"])
            table = table.replace_schema_metadata({MARK: self._whole.encode()})
            if writer is None:
                writer = pq.ParquetWriter(hidden, table.schema)
            writer.write_table(table)
            rows += len(table)
        assert writer is not None, "no shards"
        writer.close()
        self.bad.unlink(missing_ok=True)
        if lines:
            listed = self.parts / ".bad.tmp"
            listed.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            _publish(listed, self.bad)
        _publish(hidden, self.path)
        shutil.rmtree(self.parts)
        return rows, len(lines)

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.parquet"

    def _of(self, name: str) -> str:
        return json.dumps({**self.about, "shard": name, "identity": self.identities[name]}, sort_keys=True)


def read_about(path: str | Path) -> dict[str, Any]:
    """Return where the rows of a file come from; empty where nobody has said."""
    return dict(json.loads(_mark(Path(path)) or "{}"))


def _mark(path: Path) -> str:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):  # not there, or no parquet
        return ""
    return bytes(metadata.get(MARK, b"")).decode()


def _column(values: Sequence[str] | NDArray[Any]) -> Any:
    if not isinstance(values, np.ndarray):  # odd bytes in a foreign key must have a name, too
        return pa.array([str(value).encode("utf-8", "backslashreplace").decode() for value in values], pa.string())
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _publish(hidden: Path, final: Path) -> None:
    with open(hidden, "rb") as file:
        os.fsync(file.fileno())
    os.replace(hidden, final)

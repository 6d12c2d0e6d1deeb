"""Tables of (shard, key) or (shard, key, score): Parquet, JSON lines, or text. They say which samples are meant."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools import _rows
from pretrain.config import ConfigError
from pretrain.registry import nearest

KINDS = (".parquet", ".jsonl", ".tsv", ".txt")


def read(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns; a text file has them in this order, with tabs between them.

    Raises:
        ConfigError: no such file, an unknown kind, or a column or cell that is missing.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file; name a table of {', '.join(columns)}")
    if path.suffix == ".parquet":
        return _parquet(path, columns)
    if path.suffix == ".jsonl":
        return _lines(path, columns)
    if path.suffix in (".txt", ".tsv"):
        return _text(path, columns)
    raise ConfigError(f"{path}: unknown kind {path.suffix!r}; name one of {', '.join(KINDS)}")


def chosen(path: Path, source: Sequence[_rows.Shard]) -> list[NDArray[np.bool_]]:
    """Return, for each shard, which of its samples a table names.

    Raises:
        ConfigError: the table names a sample that is not there, or two shards have the same name.
    """
    by_name = shards_by_name(source)
    keys: dict[int, dict[str, int]] = {}
    found = [np.zeros(len(shard.lines), bool) for shard in source]
    for row, (name, key) in enumerate(read(path, ("shard", "key")), 1):
        number = by_name.get(Path(str(name)).name)
        if number is not None and number not in keys:
            keys[number] = {_rows.key_of(line): at for at, line in enumerate(source[number].lines)}
        if number is None or str(key) not in keys[number]:
            raise ConfigError(f"{path}, row {row}: there is no sample {key!r} in a shard {name!r}; is it of this set?")
        found[number][keys[number][str(key)]] = True
    return found


def shards_by_name(source: Sequence[_rows.Shard]) -> dict[str, int]:
    """Return the number of each shard by its base name.

    Raises:
        ConfigError: two have the same.
    """
    found: dict[str, int] = {}
    for number, shard in enumerate(source):
        if found.setdefault(shard.path.name, number) != number:
            other = source[found[shard.path.name]].path
            raise ConfigError(f"{other} and {shard.path}: a table cannot tell them apart; do one set at a time")
    return found


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        from pyarrow import ArrowInvalid, parquet  # imported late: most commands need no tables
    except ImportError:
        raise ConfigError(f"{path}: Parquet needs pyarrow; run `pip install 'diptych[tools]'`") from None
    try:
        with parquet.ParquetFile(path) as file:
            _require(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns))
    except ArrowInvalid as error:
        raise ConfigError(f"{path}: is no readable Parquet file ({error})"[:300]) from None


def _lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: is not JSON ({error})") from None
            _require(path, columns, list(record) if isinstance(record, dict) else [])
            yield tuple(record[name] for name in columns)


def _text(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\n").split("\t")
            if len(cells) != len(columns):
                raise ConfigError(f"{path}, line {number}: write {', '.join(columns)} with tabs between them")
            yield tuple(cells)


def _require(path: Path, columns: Sequence[str], known: Sequence[str]) -> None:
    for column in columns:
        if column not in known:
            raise ConfigError(f"{path}: no column {column!r}.{nearest(column, list(known))} It has: {', '.join(known)}")

"""A data set as numbered rows: the lines of its indexes, of which a plan picks some and puts them in another order."""

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools import _engine
from pretrain.data import format as shards
from pretrain.data import headers

Rows = NDArray[np.int64]  #: [N, 2]: number of the shard, number of the sample in it


class Shard(NamedTuple):
    """One shard of the source."""

    path: Path
    lines: list[bytes]  #: of its index, one a sample: a tenth of the memory of parsed entries


def opened(paths: Sequence[Path], *, state: Path, engine: _engine.Engine) -> list[Shard]:
    """Return the shards with their samples; those without an index are scanned, nothing is written beside them.

    Raises:
        ShardError: a shard or index cannot be used.
    """
    bare = [path for path in paths if not shards.index_path(path).exists()]
    tasks = [
        _engine.Task(f"index-{number:06d}", path, _engine.digest(path), path.stat().st_size)
        for number, path in enumerate(bare)
    ]
    made = dict(zip(bare, _engine.run(scanned, tasks, state=state, engine=engine, doing="index"))) if bare else {}
    return [Shard(path, _lines(path, made.get(path))) for path in paths]


def scanned(path: Path) -> bytes:
    """Return what the index of a shard would hold."""
    return shards.index_bytes(path.stat().st_size, headers.scan(path))


def _lines(path: Path, index: bytes | None) -> list[bytes]:
    data = shards.index_path(path).read_bytes() if index is None else index
    shards.check_index(data, path, path.stat().st_size)
    return data.removesuffix(b"\n").split(b"\n")[1:]


def all_rows(source: Sequence[Shard]) -> Rows:
    """Return every sample, in the order of the shards."""
    parts = [np.stack([np.full(len(s.lines), n), np.arange(len(s.lines))], 1) for n, s in enumerate(source)]
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def key_of(line: bytes) -> str:
    """Return the key that a line of an index names."""
    return str(json.loads(line.partition(b"\t")[0]))


def prefix_of(path: Path) -> str:
    """Return the split that a shard belongs to by its name: train of train-00042.tar, and of 00042.tar."""
    return path.stem.rstrip("0123456789").rstrip("-_.") or "train"


def by_split(rows: Rows, source: Sequence[Shard]) -> dict[str, Rows]:
    """Return rows by the split of their shard: what was held out stays so."""
    prefix_N = np.array([prefix_of(shard.path) for shard in source])[rows[:, 0]]
    return {str(prefix): rows[prefix_N == prefix] for prefix in np.unique(prefix_N)}


def shuffled(rows: Rows, source: Sequence[Shard], seed: int) -> Rows:
    """Return rows in an order that depends on the seed and on (shard, key) of each row, not on its place."""
    marks = [mark(seed, source[n].path.name, key_of(source[n].lines[m])) for n, m in rows.tolist()]
    return rows[np.argsort(np.array(marks, np.uint64), kind="stable")]


def held_out(rows: Rows, source: Sequence[Shard], fraction: float) -> NDArray[np.bool_]:
    """Return which rows belong to the validation split: as in `build`, a function of the key alone."""

    def share(key: str) -> float:
        return int(sha256(key.encode()).hexdigest(), 16) / 2**256

    return np.array([share(key_of(source[n].lines[m])) < fraction for n, m in rows.tolist()], bool)


def mark(*parts: object) -> int:
    """Return 8 bytes of hash as a number."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=8).digest())


def renamed(rows: Rows, source: Sequence[Shard]) -> dict[int, str]:
    """Return new keys, by number of the row, for those that cannot keep theirs.

    A key that an earlier row has becomes KEY-2, KEY-3, ...; one that is no relative name loses what makes it none.
    """
    keys = [key_of(source[n].lines[m]) for n, m in rows.tolist()]
    counts = Counter(keys)
    odd = {number for number, key in enumerate(keys) if key.startswith("/") or ".." in key.split("/")}
    if not odd and len(counts) == len(keys):
        return {}
    taken, found = set(counts), {}
    seen: set[str] = set()
    for number, key in enumerate(keys):
        plain = "/".join(part for part in key.split("/") if part not in ("", "..")) if number in odd else key
        if plain != key and plain not in taken:
            found[number] = plain
            taken.add(plain)
        elif plain != key or key in seen:
            found[number] = next(name for at in range(2, len(keys) + 3) if (name := f"{plain}-{at}") not in taken)
            taken.add(found[number])
        seen.add(key)
    return found

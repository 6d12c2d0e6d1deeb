"""Write picked rows of a data set as new shards, by byte copy: nothing is decoded, equal plans write equal bytes.

Each output shard is one task: killed, the same command keeps those that are whole and writes the others.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import _engine, _rows, _tar
from data_tools._folder import STATE
from pretrain.config import ConfigError
from pretrain.data import format as shards

COPY, PLAN = "copy-", "copy.plan"
OPEN = 64  # tars that a worker keeps open
AT_ONCE = 256 * 1024 * 1024  # bytes of a shuffled shard that are read in the order of the disk, then written


class Piece(NamedTuple):
    """One output shard."""

    out: Path
    sources: list[Path]
    rows: list[tuple[int, bytes, str | None]]  #: (number in sources, line of its index, another key)


def check_out(out: Path, sources: Sequence[Path]) -> None:
    """Refuse an output folder that would mix or overwrite what is there.

    Raises:
        ConfigError: it holds shards that no copy of ours wrote, the sources among them.
    """
    own = _planned(out / STATE)
    others = sorted(path.name for path in out.glob("*.tar") if path.name not in own)
    if others:
        raise ConfigError(f"--out {out}: holds {others[0]}, which is not of an earlier run; name another folder")
    if any(path.parent.resolve() == out.resolve() for path in sources):
        raise ConfigError(f"--out {out}: is the folder of the source; name another one")


def write(
    source: Sequence[_rows.Shard],
    splits: Mapping[str, _rows.Rows],
    out: Path,
    *,
    shard_size: int,
    engine: _engine.Engine,
    meta: Mapping[str, Any],
) -> dict[str, shards.Listed]:
    """Write the rows of each split into `out`, which is claimed, and dataset.json; return what that says of shards.

    Raises:
        ShardError: nothing is left to write, or a source cannot be read.
    """
    if not any(map(len, splits.values())):
        raise shards.ShardError(f"{out}: no sample is left; nothing to write")
    state = out / STATE
    (out / shards.MANIFEST).unlink(missing_ok=True)  # half a set vouches for nothing
    stats = {number: _engine.digest(shard.path) for number, shard in enumerate(source)}
    tasks = [
        _task(source, stats, out / f"{split}-{number:05d}.tar", rows[start : start + shard_size], names, start)
        for split, rows in splits.items()
        for names in [_rows.renamed(rows, source)]
        for number, start in enumerate(range(0, len(rows), shard_size))
    ]
    plan(out, state, {task.argument.out.name for task in tasks})
    results = _engine.run(copied, tasks, state=state, engine=engine, doing="write", fits=whole)
    notes = map(json.loads, results)
    counts = {note["name"]: (note["samples"], note["bytes"], note.get("sha256", "")) for note in notes}
    shards.write_manifest(out, counts, meta)
    return counts


def tell(out: Path, counts: Mapping[str, shards.Listed]) -> None:
    """Print what `write` has written."""
    total, size = (sum(row[at] for row in counts.values()) for at in (0, 1))
    print(f"{out}: {total} samples in {len(counts)} shards, {size / 1e6:.1f} MB")


def copied(piece: Piece) -> bytes:
    """Write one shard and return a note of it."""
    with shards.ShardWriter(piece.out) as writer, ExitStack() as stack:
        tars: dict[int, _tar.Tar] = {}
        for batch in _batches(piece.rows):
            entries = [shards.read_row(line) for _, line, _ in batch]
            places = [
                (number, offset, size, at, name)
                for at, ((number, _, _), entry) in enumerate(zip(batch, entries))
                for name, (offset, size) in entry.members.items()
            ]
            read: list[dict[str, bytes]] = [{} for _ in batch]
            for number, offset, size, at, name in sorted(places):
                if number not in tars:
                    if len(tars) >= OPEN:
                        stack.pop_all().close()
                        tars.clear()
                    tars[number] = stack.enter_context(_tar.opened(piece.sources[number]))
                read[at][name] = tars[number].read((offset, size))
            for (_, _, key), entry, members in zip(batch, entries, read):
                writer.add(key or entry.key, {name: members[name] for name in entry.members})
    samples, size, sha256 = writer.listed
    return json.dumps({"name": piece.out.name, "samples": samples, "bytes": size, "sha256": sha256}).encode()


def _batches(rows: Sequence[tuple[int, bytes, str | None]]) -> list[list[tuple[int, bytes, str | None]]]:
    """Cut the rows of a shard into runs that fit into memory."""
    batches: list[list[tuple[int, bytes, str | None]]] = [[]]
    held = 0
    for row in rows:
        size = sum(int(cell.rpartition(b":")[2]) for cell in row[1].split(b"\t")[1:])
        if batches[-1] and held + size > AT_ONCE:
            batches.append([])
            held = 0
        batches[-1].append(row)
        held += size
    return batches


def _task(
    source: Sequence[_rows.Shard],
    stats: Mapping[int, str],
    out: Path,
    rows: _rows.Rows,
    names: Mapping[int, str],
    start: int,
) -> _engine.Task:
    used = sorted(set(rows[:, 0].tolist()))
    number = {shard: at for at, shard in enumerate(used)}
    lines = [
        (number[shard], source[shard].lines[member], names.get(start + at))
        for at, (shard, member) in enumerate(rows.tolist())
    ]
    piece = Piece(out, [source[shard].path for shard in used], lines)
    digest = _engine.digest(out.name, [stats[shard] for shard in used], lines)
    size = sum(source[shard].path.stat().st_size * len(rows) // max(1, len(source[shard].lines)) for shard in used)
    return _engine.Task(f"{COPY}{out.name}", piece, digest, size // max(1, len(used)))


def whole(task: _engine.Task, result: bytes) -> bool:
    """Return whether the shard that a note speaks of is still there, with its index."""
    path = task.argument.out
    try:
        note = json.loads(result)
        return path.stat().st_size == note["bytes"] and len(shards.read_index(path)) == note["samples"]
    except (OSError, ValueError):
        return False


def _planned(state: Path) -> set[str]:
    """Return the names of the shards that an earlier run wrote or was about to write."""
    try:
        return set(json.loads((state / PLAN).read_bytes()))
    except FileNotFoundError:
        return set()


def plan(out: Path, state: Path, names: set[str]) -> None:
    """Note what is going to be written; remove the shards that an earlier plan wrote and this one does not."""
    others = sorted(_planned(state) - names)
    shards.write_atomic(state / PLAN, json.dumps(sorted(names.union(others))).encode())
    for name in others:
        for stale in (out / name, shards.index_path(out / name), state / f"{COPY}{name}.result"):
            stale.unlink(missing_ok=True)
    shards.write_atomic(state / PLAN, json.dumps(sorted(names)).encode())

"""From a table of URLs to the parts that img2dataset is given: what is no URL on the web is left out and counted."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from data_tools import _progress
from data_tools.sources.base import LinkBlob, Options, Row
from pretrain.data import format as shards

PART_SHARDS = 20  # shards a part: what is in memory at once, here and there
# names that img2dataset gives a meaning of its own
RESERVED = {
    "key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message", "exif",
    "md5", "sha256", "sha512",
}  # fmt: skip

FINAL = (
    "HTTP Error 400", "HTTP Error 401", "HTTP Error 403", "HTTP Error 404", "HTTP Error 410", "HTTP Error 451",
    "Use of image disallowed", "hash mismatch", "unknown url type",
)  # fmt: skip


class Plan(NamedTuple):
    """What there is to download."""

    rows: int
    columns: list[str]  #: besides url, caption and sha256
    hashed: bool  #: whether the table says the sha256 of each picture
    left_out: dict[str, int]  #: reason -> rows


def write(
    source: ModuleType, table: Path, options: Options, *, hashes: str | None, folder: Path, shard_size: int
) -> Plan:
    """Write part-00000.parquet ... and plan.json into `folder`, all or nothing, and return the plan."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    names = _columns(source, table, options)
    hashed = hashes in names
    names = [name for name in names if name != hashes]
    hashes = hashes if hashed else None
    left_out: Counter[str] = Counter()
    with _progress.bar(source.count(table, options), doing="plan", unit="url") as bar:
        found = _usable(source.rows(table, options), left_out, bar)
        rows = write_parts((_cells(row, names, hashes) for row in found), part, shard_size=shard_size)
    plan = Plan(rows, [_renamed(name) for name in names], hashed, dict(left_out.most_common()))
    shards.write_atomic(part / "plan.json", json.dumps(plan._asdict(), ensure_ascii=False).encode())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return plan


def read(folder: Path) -> Plan | None:
    """Return a plan that was written to its end."""
    try:
        return Plan(**json.loads((folder / "plan.json").read_bytes()))
    except FileNotFoundError:
        return None


def write_failed(folder: Path, output: Path, again: Path, *, shard_size: int) -> Plan:
    """Plan the URLs of an earlier plan anew whose download failed for a reason that may have passed, all or nothing."""
    from pyarrow import parquet

    plan = read(folder)
    assert plan is not None, "it was downloaded"
    part = again.with_name(f"{again.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def failed() -> Iterator[dict[str, Any]]:
        for number, path in enumerate(sorted(folder.glob("part-*.parquet"))):
            rows = parquet.read_table(path)
            for at in range(0, rows.num_rows, shard_size):
                shard = number * PART_SHARDS + at // shard_size
                told = parquet.read_table(output / f"{shard:05d}.parquet", columns=["key", "status", "error_message"])
                for row in told.to_pylist():
                    if row["status"] == "failed_to_download" and not _is_final(row["error_message"] or ""):
                        yield rows.slice(at + int(row["key"][-digits:] if digits else 0), 1).to_pylist()[0]

    digits = len(str(shard_size - 1)) if shard_size > 1 else 0  # of the place inside a shard, in img2dataset's keys
    rows = write_parts(failed(), part, shard_size=shard_size)
    plan = Plan(rows, plan.columns, plan.hashed, {})
    shards.write_atomic(part / "plan.json", json.dumps(plan._asdict(), ensure_ascii=False).encode())
    shutil.rmtree(again, ignore_errors=True)
    os.replace(part, again)
    return plan


def _is_final(message: str) -> bool:
    """Return whether asking again is vain or unwanted."""
    return message.startswith(FINAL)


def write_parts(cells: Iterable[dict[str, Any]], folder: Path, *, shard_size: int) -> int:
    """Write rows as parquet, PART_SHARDS whole shards a file, and return their number."""
    import pyarrow as pa
    from pyarrow import parquet

    total, waiting = 0, list[dict[str, Any]]()

    def flush() -> None:
        nonlocal total
        names = list(waiting[0])
        arrays = [_array(pa, [row[name] for row in waiting]) for name in names]
        parquet.write_table(
            pa.Table.from_arrays(arrays, names), folder / f"part-{total // (PART_SHARDS * shard_size):05d}.parquet"
        )
        total += len(waiting)
        waiting.clear()

    for row in cells:
        waiting.append(row)
        if len(waiting) == PART_SHARDS * shard_size:
            flush()
    if waiting:
        flush()
    return total


def _usable(rows: Iterator[Row], left_out: Counter[str], bar: Any) -> Iterator[Row]:
    for row in rows:
        bar.update()
        if row.problem:
            left_out[row.problem] += 1
        elif not isinstance(row.image, LinkBlob):
            left_out["not a URL"] += 1
        elif not row.image.url.lower().startswith(("http://", "https://")):  # file:// would read this machine's files
            left_out["not a URL of http or https"] += 1
        elif not row.captions:
            left_out["no caption"] += 1
        else:
            yield row


def _columns(source: ModuleType, table: Path, options: Options) -> list[str]:
    """Return the further columns; lines of JSON may each have others, tables have them all in every row."""
    names: dict[str, None] = {}
    for row in source.rows(table, options):
        names.update(dict.fromkeys(row.record))
        if len(row.captions) > 1:
            names["captions"] = None
        if not table.suffix.endswith("jsonl") and not row.problem:
            break
    return list(names)


def _cells(row: Row, names: Sequence[str], hashes: str | None) -> dict[str, Any]:
    assert isinstance(row.image, LinkBlob), "others are left out"
    record = {**row.record, "captions": row.captions}
    cells = {"url": row.image.url, "caption": row.captions[0]}
    if hashes is not None:
        cells["sha256"] = str(row.record.get(hashes)).lower()
    return {**cells, **{_renamed(name): record.get(name) for name in names}}


def _renamed(name: str) -> str:
    return f"source_{name}" if name in RESERVED else name


def _array(pa: Any, values: list[Any]) -> Any:
    """Return a column of one type; of text, where the table mixes types."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        array = pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array

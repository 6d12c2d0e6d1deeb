"""Where pairs come from: a folder of files with equal stems, a CSV or TSV table, or JSON lines.

A source yields rows in an order that only depends on what is there; a row that cannot be a sample says why.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools._captions import captions_in
from pretrain.config import ConfigError
from pretrain.data.decode import IMAGES, BadSample, decode_json, decode_text
from pretrain.registry import nearest

MAX_FIELD = 16 * 1024 * 1024  # characters in one cell; the csv module stops at 131072 otherwise


class Row(NamedTuple):
    """One pair before its image is read."""

    number: int  #: place in the source, bad rows counted: the key, stable when another row is mended
    where: str  #: for people: file or line
    image: Path | None
    captions: list[str]
    record: dict[str, Any]  #: everything else that the source says
    problem: str = ""  #: why this row is no sample, as far as known without the image


class Columns(NamedTuple):
    """How a table is to be read."""

    image: str = "image"
    caption: str = "caption"
    separator: str | None = None  #: None: a tab in .tsv, else a comma
    root: Path | None = None  #: what relative image paths start from; None: the table's folder


def rows(source: Path, *, columns: Columns, leave_out: Path) -> Iterator[Row]:
    """Return the rows of a folder or table; `leave_out` is a folder that is not looked into.

    Raises:
        ConfigError: there is no such source, its kind is unknown, or it lacks a column.
    """
    if source.is_dir():
        return _folder(source, leave_out.resolve())
    if not source.exists():
        raise ConfigError(f"source {source}: no such file or folder; name a folder of pairs, a .csv, .tsv or .jsonl")
    if source.suffix in (".csv", ".tsv"):
        return _table(source, columns)
    if source.suffix in (".jsonl", ".ndjson"):
        return _lines(source, columns)
    raise ConfigError(f"source {source}: unknown kind {source.suffix!r}; name a folder, a .csv, .tsv or .jsonl")


def _folder(folder: Path, leave_out: Path) -> Iterator[Row]:
    """Yield every image with the .txt and .json of its stem; a .txt without image is a row with a problem."""
    number = 0
    for path, names in _walk(folder, leave_out):
        images = [name for name in names if _extension(name) in IMAGES]
        have = {Path(name).stem for name in images}
        orphans = [name for name in names if _extension(name) == "txt" and Path(name).stem not in have]
        for name in sorted(images + orphans):
            where = str((path / name).relative_to(folder))
            if name in orphans:
                yield Row(number, where, None, [], {}, "no image file beside the caption")
            else:
                yield _pair(number, where, path / name, names)
            number += 1


def _walk(folder: Path, leave_out: Path) -> Iterator[tuple[Path, set[str]]]:
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(path) / f).resolve() != leave_out)
        yield Path(path), {name for name in names if not name.startswith(".")}


def _extension(name: str) -> str:
    return Path(name).suffix.lower().removeprefix(".")


def _pair(number: int, where: str, image: Path, names: set[str]) -> Row:
    captions: list[str] = []
    record: dict[str, Any] = {}
    try:
        if f"{image.stem}.json" in names:
            found = decode_json(image.with_suffix(".json").read_bytes())
            if not isinstance(found, dict):
                raise BadSample("json is not an object")
            record, captions = found, captions_in(found)
        if f"{image.stem}.txt" in names:
            text = decode_text(image.with_suffix(".txt").read_bytes()).strip()
            captions = [text, *captions]
        elif not record:
            return Row(number, where, image, [], {}, "no caption file beside the image")
    except (BadSample, OSError) as error:
        return Row(number, where, image, [], {}, str(error))
    return Row(number, where, image, _different(captions), record)


def _different(captions: list[str]) -> list[str]:
    return [caption for caption in dict.fromkeys(captions) if caption]


def _table(path: Path, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    separator = columns.separator or ("\t" if path.suffix == ".tsv" else ",")
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator)
        for column in (columns.image, columns.caption):
            _require(path, column, list(reader.fieldnames or []))
        try:
            for number, cells in enumerate(reader):
                yield _cells(number, path, reader.line_num, cells, columns)
        except csv.Error as error:
            raise ConfigError(f"source {path}, line {reader.line_num}: not readable as a table ({error})") from error


def _require(path: Path, column: str, known: list[str]) -> None:
    if column not in known:
        raise ConfigError(
            f"source {path}: no column {column!r}.{nearest(column, known)} It has: {', '.join(map(repr, known))}; "
            "name others with --image-column, --caption-column and --separator"
        )


def _cells(number: int, path: Path, line: int, cells: dict[Any, Any], columns: Columns) -> Row:
    where = f"{path.name} line {line}"
    if any("\udc80" <= letter <= "\udcff" for cell in cells.values() for letter in str(cell)):
        return Row(number, where, None, [], {}, "row is not UTF-8")
    if None in cells or None in cells.values():
        return Row(number, where, None, [], {}, "row has another number of cells than the header")
    record = {key: value for key, value in cells.items() if key not in (columns.image, columns.caption)}
    return _with_image(number, where, path, cells[columns.image], [cells[columns.caption].strip()], record, columns)


def _lines(path: Path, columns: Columns) -> Iterator[Row]:
    with open(path, "rb") as file:
        filled: Iterable[tuple[int, bytes]] = ((at, line) for at, line in enumerate(file, 1) if line.strip())
        for number, (at, line) in enumerate(filled):
            where = f"{path.name} line {at}"
            try:
                record = decode_json(line, name="line")
                if not isinstance(record, dict):
                    raise BadSample("line is not a JSON object")
                captions = captions_in(record, key=columns.caption)
            except BadSample as error:
                yield Row(number, where, None, [], {}, str(error))
                continue
            image = record.pop(columns.image, None)
            record = {key: value for key, value in record.items() if key not in (columns.caption, "captions")}
            yield _with_image(number, where, path, image, captions, record, columns)


def _with_image(
    number: int, where: str, path: Path, image: Any, captions: list[str], record: dict[str, Any], columns: Columns
) -> Row:
    if not isinstance(image, str) or not image.strip() or "\0" in image:
        return Row(number, where, None, captions, record, f"no image path under {columns.image!r}")
    return Row(number, where, (columns.root or path.parent) / image.strip(), _different(captions), record)


def as_json(row: Row) -> dict[str, Any]:
    """Return what the json member of a row's sample holds: all that the source says, and its captions if several."""
    own = {"captions": row.captions} if len(row.captions) > 1 else {}
    return {**row.record, **own}

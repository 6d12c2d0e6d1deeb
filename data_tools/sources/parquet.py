"""Parquet: a column of image bytes, of Hugging Face's {bytes, path}, of paths or of base64; read by row groups."""

import base64
import datetime
import decimal
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools._captions import captions_in
from data_tools.sources.base import Blob, Options, Row, column_of, different, layout, picture
from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.format import ShardError

IMAGE = ("image", "jpg", "png", "webp", "jpeg", "image_bytes", "bytes", "image_path")
CAPTION = ("caption", "captions", "txt", "text")
BATCH = 32  # rows in memory at once


def claims(source: Path) -> bool:
    """Return whether the path is a .parquet file, or a folder of them without tars and pictures beside."""
    return source.suffix == ".parquet" if source.is_file() else source.is_dir() and layout(source) == "parquet"


def count(source: Path, options: Options) -> int:
    """Return the number of rows."""
    return sum(_opened(path).metadata.num_rows for path in _files(source))


def rows(source: Path, options: Options) -> Iterator[Row]:
    """Yield the rows of all files in the order of their names; downloads that failed (img2dataset) are no rows.

    Raises:
        ConfigError: there is no column of images or captions, or pyarrow is missing.
        ShardError: a file is no parquet or damaged.
    """
    number = 0
    for path in _files(source):
        file = _opened(path)
        image, caption = _columns(path, file.schema_arrow, options)
        try:
            for batch in file.iter_batches(batch_size=BATCH):
                for cells in batch.to_pylist():
                    if cells[image] is not None or cells.get("status", "success") == "success":
                        yield _row(number, f"{path.name} row {number}", cells, image, caption, path.parent, options)
                    number += 1
        except OSError as error:
            raise ShardError(f"source {path}: damaged at row {number} ({error}); fetch it again") from error


def _files(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(p for p in source.glob("*.parquet") if not p.name.startswith("."))


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError("pyarrow is not installed and reads parquet: run `pip install 'diptych[tools]'`") from None
    try:
        return parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (ArrowException, OSError) as error:
        raise ShardError(f"source {path}: not a readable parquet file ({error}); fetch it again") from error


def _columns(path: Path, schema: Any, options: Options) -> tuple[str, str | None]:
    """Return the names of the image and caption columns; there may be no caption where none is needed."""
    names = list(schema.names)
    image = names[column_of(options.image, IMAGE, names, path, "--image-column")]
    if options.caption is None and options.wordless and not set(CAPTION) & set(names):
        return image, None
    return image, names[column_of(options.caption, CAPTION, names, path, "--caption-column")]


def _row(
    number: int, where: str, cells: dict[str, Any], image: str, caption: str | None, root: Path, options: Options
) -> Row:
    record = {key: plain(value) for key, value in cells.items() if key not in (image, caption)}
    if caption == "txt" and "caption" in record:  # img2dataset says it twice
        del record["caption"]
    try:
        captions = captions_in({"captions": cells.get(caption) or []})
        found = _picture(cells[image], root, options)
    except BadSample as error:
        return Row(number, where, None, [], record, str(error))
    problem = "" if found else f"no image under {image!r}"
    return Row(number, where, found, different(captions), record, problem, wordless=options.wordless)


def _picture(cell: Any, root: Path, options: Options) -> Blob | None:
    if isinstance(cell, dict):  # Hugging Face: the bytes, else a path
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, list):
        raise BadSample(f"{len(cell)} images in one row; one is expected")
    return picture(cell, root, options)


def plain(value: Any) -> Any:
    """Return a cell as JSON has it: times as text, numbers that are none as null, bytes as base64."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value

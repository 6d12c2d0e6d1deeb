"""JSON lines: an object a line, with an image path or base64 image and a caption or a list of captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools._captions import captions_in
from data_tools.sources.base import Options, Row, count_lines, different, picture
from pretrain.data.decode import BadSample, decode_json


def claims(source: Path) -> bool:
    """Return whether the path is a file that ends in .jsonl or .ndjson."""
    return source.is_file() and source.suffix in (".jsonl", ".ndjson")


def count(source: Path, options: Options) -> int:
    """Return about the number of rows: one a line."""
    return count_lines(source)


def rows(source: Path, options: Options) -> Iterator[Row]:
    """Yield a row a line that is not blank."""
    image, caption = options.image or "image", options.caption or "caption"
    with open(source, "rb") as file:
        filled = ((at, line) for at, line in enumerate(file, 1) if line.strip())
        for number, (at, line) in enumerate(filled):
            where = f"{source.name} line {at}"
            try:
                record, captions = _object(line, caption)
            except BadSample as error:
                yield Row(number, where, None, [], {}, str(error))
                continue
            found = picture(record.pop(image, None), source.parent, options)
            record = {key: value for key, value in record.items() if key not in (caption, "captions")}
            problem = "" if found else f"no image path under {image!r}"
            yield Row(number, where, found, different(captions), record, problem, wordless=options.wordless)


def _object(line: bytes, caption: str) -> tuple[dict[str, Any], list[str]]:
    record = decode_json(line, name="line")
    if not isinstance(record, dict):
        raise BadSample("line is not a JSON object")
    return record, captions_in(record, key=caption)

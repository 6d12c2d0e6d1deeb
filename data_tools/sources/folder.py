"""A folder of pairs: photo.jpg beside photo.txt and/or photo.json, in folders of any depth."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools._captions import captions_in
from data_tools.sources.base import FileBlob, Options, Row, different, layout
from pretrain.data.decode import IMAGES, BadSample, decode_json, decode_text


def claims(source: Path) -> bool:
    """Return whether the path is a folder that holds neither tars nor only parquet files."""
    return source.is_dir() and layout(source) == "pairs"


def count(source: Path, options: Options) -> int:
    """Return the number of rows."""
    return sum(1 for path, names in _walk(source, options.leave_out) for _ in _listed(names))


def rows(source: Path, options: Options) -> Iterator[Row]:
    """Yield every image with the .txt and .json of its stem; a .txt without image is a row with a problem."""
    number = 0
    for path, names in _walk(source, options.leave_out):
        for name in _listed(names):
            where = str((path / name).relative_to(source))
            if _extension(name) == "txt":
                yield Row(number, where, None, [], {}, "no image file beside the caption")
            else:
                yield _pair(number, where, path / name, names, options)
            number += 1


def _listed(names: set[str]) -> list[str]:
    """Return images, and captions without image, in order."""
    images = [name for name in names if _extension(name) in IMAGES]
    have = {Path(name).stem for name in images}
    return sorted(images + [name for name in names if _extension(name) == "txt" and Path(name).stem not in have])


def _walk(folder: Path, leave_out: Path) -> Iterator[tuple[Path, set[str]]]:
    leave_out = leave_out.resolve()
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(path) / f).resolve() != leave_out)
        yield Path(path), {name for name in names if not name.startswith(".")}


def _extension(name: str) -> str:
    return Path(name).suffix.lower().removeprefix(".")


def _pair(number: int, where: str, image: Path, names: set[str], options: Options) -> Row:
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
        elif not record and not options.wordless:
            return Row(number, where, FileBlob(image), [], {}, "no caption file beside the image")
    except (BadSample, OSError) as error:
        return Row(number, where, FileBlob(image), [], {}, str(error))
    return Row(number, where, FileBlob(image), different(captions), record, wordless=options.wordless)

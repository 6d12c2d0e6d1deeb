"""WebDataset tars made elsewhere (img2dataset's too): members are copied byte for byte under new, unique keys."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_tools._captions import captions_in
from data_tools.sources.base import Options, PartBlob, Row, different, layout
from pretrain.config import ConfigError
from pretrain.data import format as shards
from pretrain.data import headers
from pretrain.data.decode import IMAGES, BadSample, decode_json, decode_text

COUNTED = 8  # tars whose samples are really counted


def claims(source: Path) -> bool:
    """Return whether the path is a .tar or a folder of them."""
    return source.suffix == ".tar" if source.is_file() else source.is_dir() and layout(source) == "tars"


def count(source: Path, options: Options) -> int:
    """Return about the number of samples: as many in each byte as the first tars have."""
    paths = _tars(source)
    some = paths[:COUNTED]
    seen = sum(len(_entries(path)) for path in some)
    size = sum(path.stat().st_size for path in some)
    return seen * sum(path.stat().st_size for path in paths) // max(size, 1)


def rows(source: Path, options: Options) -> Iterator[Row]:
    """Yield the samples of all tars in the order of their names; texts are read here, pictures later.

    Raises:
        ConfigError: a tar of img2dataset that was never finished.
        ShardError: a tar is cut off or damaged.
    """
    number = 0
    for path in _tars(source):
        changed = path.stat().st_mtime_ns
        with open(path, "rb") as file:
            for entry in _entries(path):
                yield _row(number, path, file, entry, changed, options)
                number += 1


def _tars(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    paths = sorted(path for path in source.glob("*.tar") if not path.name.startswith("."))
    if any(re.fullmatch(r"\d+_stats\.json", path.name) for path in source.iterdir()):
        for path in paths:
            if path.stem.isdecimal() and not path.with_name(f"{path.stem}_stats.json").exists():
                raise ConfigError(
                    f"source {path}: has no {path.stem}_stats.json, so img2dataset never finished it; "
                    "let it finish, or move the tar away"
                )
    return paths


def _entries(path: Path) -> list[shards.Entry]:
    try:
        return shards.read_index(path)
    except (OSError, shards.ShardError):  # no index, or that of an older tar
        return headers.scan(path)


def _row(number: int, path: Path, file: IO[bytes], entry: shards.Entry, changed: int, options: Options) -> Row:
    where = f"{path.name} {entry.key}"
    parts = {name: PartBlob(path, at, size, changed) for name, (at, size) in entry.members.items()}
    extension = next((name for name in IMAGES if name in parts), None)
    if extension is None:
        return Row(number, where, None, [], {}, f"no image among {', '.join(parts)}")
    texts = {name: entry.members[name] for name in ("txt", "json") if name in parts}
    try:
        captions, record = _texts(shards.read_members(file, shards.Entry(entry.key, texts)))
    except BadSample as error:
        return Row(number, where, parts[extension], [], {}, str(error))
    others = {name: part for name, part in parts.items() if name not in (extension, "txt", "json")}
    captions = different(captions)
    return Row(number, where, parts[extension], captions, record, "", others, wordless=options.wordless)


def _texts(members: Mapping[str, bytes]) -> tuple[list[str], dict[str, Any]]:
    captions = [decode_text(members["txt"]).strip()] if "txt" in members else []
    record = decode_json(members["json"]) if "json" in members else {}
    if not isinstance(record, dict):
        raise BadSample("json is not an object")
    return captions + captions_in(record), record

"""Pictures with captions for retrieval, in the forms in which people have them, as samples that have not been read yet.

FOLDER/*.jpg beside *.txt, one caption a line      cut by hash: 80 % train, 10 % validation, 10 % test
FOLDER/train/*.jpg beside *.txt, test/...          [validation/...]; folders inside may have any depth
TABLE.csv with the columns path, caption [, split] rows of one path are captions of one picture
dataset_NAME.json                                  Karpathy's splits; task.images: where the pictures lie
FOLDER/train-*.tar  test-*.tar                     or a pattern with {split}; captions as the caption reader finds them

Validation may be called val.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.sources import SPLITS, Picture, form, picture, refuse_empty, shards, split_folder, table
from pretrain.config import ConfigError
from pretrain.data.decode import IMAGES
from pretrain.dist import hash64

SHARES = {"test": 0.1, "validation": 0.1}  #: of pairs that nobody has split
KARPATHY = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
FORMS = (
    "a folder of *.jpg beside *.txt (or of train/ and test/ with these), a table .csv with the columns path and "
    "caption, one of Karpathy's dataset_*.json, a folder of shards {split}-*.tar, or a pattern with {split} in it"
)


class Pair(NamedTuple):
    """One picture with its captions."""

    key: str  #: what draws depend on: never where the data lies
    captions: list[str]
    read: Callable[[], dict[str, bytes]]  #: its members: extension -> bytes

    @property
    def label(self) -> dict[str, Any]:
        """What its json member says."""
        return {"captions": self.captions, "source": self.key}


Found = dict[str, list[Pair]]  #: by split


def find(data: str, images: str | None = None) -> Found | None:
    """Return the pairs of each split; None where the data are shards already.

    Raises:
        ConfigError: no such data, no train or test split, or pictures without captions.
    """
    path = Path(data)
    match form(data, images, json="Karpathy's dataset_*.json"):
        case "json":
            found = _karpathy(path, Path(images) if images else path.parent)
        case "table":
            found = _table(path)
        case "split":
            found = {split: _folder(split_folder(path, split)) for split in SPLITS}
        case "whole":
            found = cut(_folder(path))
        case "shards":
            refuse_empty({split: shards(data, split) for split in SPLITS}, data, FORMS)
            return None
    refuse_empty(found, data, FORMS)
    return found


def cut(pairs: Iterable[Pair]) -> Found:
    """Return pairs that nobody has split as train, validation and test, in fixed shares by hash."""
    ranked = sorted(pairs, key=lambda p: (hash64("split", p.key), p.key))
    test = max(round(SHARES["test"] * len(ranked)), int(len(ranked) > 1))
    validation = test + round(SHARES["validation"] * len(ranked))
    return {"test": ranked[:test], "validation": ranked[test:validation], "train": ranked[validation:]}


def _folder(folder: Path) -> list[Pair]:
    out = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        extension, words = path.suffix[1:].lower(), path.with_suffix(".txt")
        if extension not in IMAGES or path.name.startswith("."):
            continue
        try:
            lines = [line.strip() for line in words.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"task.data: {path} has no captions in {words.name} ({error})") from error
        out.append(_pair(path.relative_to(folder).as_posix(), lines, Picture(path, extension), str(words)))
    return out


def _table(path: Path) -> Found:
    rows, columns = table(path, ("path", "caption"))
    captions: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        given = row.get("split") or "train"
        captions.setdefault((KARPATHY.get(given, given), row["path"]), []).append(row["caption"] or "")
    found: Found = {split: [] for split in SPLITS}
    for (split, name), lines in captions.items():
        if split not in SPLITS:
            raise ConfigError(f"task.data: {path}: split of {name} is {split!r}, expected one of {', '.join(SPLITS)}")
        found[split].append(_pair(name, lines, picture(path.parent / name, f"task.data: {path}"), str(path)))
    return found if "split" in columns else cut(found["train"])


def _karpathy(path: Path, images: Path) -> Found:
    """Return the splits of Karpathy & Fei-Fei (2015, arXiv:1412.2306), restval in train."""
    found: Found = {split: [] for split in SPLITS}
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["images"]:
            name = f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"]
            lines = [str(sentence["raw"]) for sentence in row["sentences"]]
            read = picture(images / name, f"{path}, task.images")
            found[KARPATHY[row["split"]]].append(_pair(name, lines, read, str(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f'task.data: {path} must hold {{"images": [{{"filename", "split", "sentences": [{{"raw"}}]}}]}} ({error!r})'
        ) from error
    return found


def _pair(key: str, lines: list[str], read: Callable[[], dict[str, bytes]], where: str) -> Pair:
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ConfigError(f"task.data: {where}: picture {key} has no caption")
    return Pair(key, captions, read)

"""COCO's annotation files: one sample an image with all its captions and, from instances, its boxes.

Boxes are [x, y, width, height] in pixels of the image, `categories` and `crowd` stand beside them in the same order.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.sources.base import Options, Row, different, picture
from pretrain.config import ConfigError


def claims(source: Path) -> bool:
    """Return whether the path is a .json file."""
    return source.is_file() and source.suffix == ".json"


def count(source: Path, options: Options) -> int:
    """Return the number of images."""
    return len(_read(source)["images"])


def rows(source: Path, options: Options) -> Iterator[Row]:
    """Yield a row an image, in the order of the file.

    Raises:
        ConfigError: the file is not one of COCO's.
    """
    tree = _read(source)
    captions: dict[Any, list[str]] = {}
    for note in tree["annotations"]:
        if "caption" in note:
            captions.setdefault(note["image_id"], []).append(str(note["caption"]).strip())
    boxed = _boxes(tree)
    if options.boxes is not None:
        boxed.update(_boxes(_read(options.boxes)))
    root = _root(source)
    for number, image in enumerate(tree["images"]):
        where = f"{source.name} image {image.get('id')}"
        record = {"image_id": image.get("id"), "width": image.get("width"), "height": image.get("height")}
        if boxed:
            record.update(boxed.get(image.get("id"), {"boxes": [], "categories": [], "crowd": []}))
        found = picture(image.get("file_name"), root, options)
        said = different(captions.get(image.get("id"), []))
        wordless = options.wordless or not captions
        yield Row(number, where, found, said, record, "" if found else "no file_name", wordless=wordless)


def _boxes(tree: Mapping[str, Any]) -> dict[Any, dict[str, list]]:
    """Return {image id: boxes, names of their categories, whether each is a crowd}."""
    names = {category["id"]: category.get("name") for category in tree.get("categories", [])}
    found: dict[Any, dict[str, list]] = {}
    for note in tree["annotations"]:
        if "bbox" in note:
            own = found.setdefault(note["image_id"], {"boxes": [], "categories": [], "crowd": []})
            own["boxes"].append(note["bbox"])
            own["categories"].append(names.get(note.get("category_id"), note.get("category_id")))
            own["crowd"].append(int(note.get("iscrowd", 0)))
    return found


def _root(source: Path) -> Path:
    """Return where images lie: train2017/ beside annotations/captions_train2017.json, else the file's own folder."""
    usual = source.parent.parent / source.stem.rpartition("_")[2]
    return usual if source.parent.name == "annotations" and usual.is_dir() else source.parent


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"source {path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=2)
def _parse(path: Path, changed: int) -> dict[str, Any]:
    """Return an annotation file; polygons are dropped while it is read, they are most of it."""
    try:
        tree = json.loads(path.read_bytes(), object_pairs_hook=_lean)
    except ValueError as error:
        raise ConfigError(f"source {path}: not JSON ({error})") from error
    lists = isinstance(tree, dict) and all(isinstance(tree.get(key), list) for key in ("images", "annotations"))
    if not lists or not all(isinstance(row, dict) for key in ("images", "annotations") for row in tree[key]):
        raise ConfigError(f"source {path}: not COCO's form, a JSON object with the lists images and annotations")
    if any("image_id" not in note for note in tree["annotations"]):
        raise ConfigError(f"source {path}: an annotation has no image_id; COCO's annotations have one")
    return tree


def _lean(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key != "segmentation"}

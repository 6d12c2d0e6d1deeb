"""One's own labelled pictures, in the forms in which people have them, as samples that have not been read yet.

    FOLDER/CLASS/*.jpg                                   cut by hash: each class 50 % train, 20 % validation, 30 % test
    FOLDER/train/CLASS/*.jpg  test/...  [validation/...]
    TABLE.csv with the columns path, class [, split]     paths from the table's folder; no split: cut by hash
    split_zhou_NAME.json                                 CoOp's published splits; task.images: where the pictures lie
    FOLDER/train-*.tar  test-*.tar  [validation-*.tar]   or a pattern such as icons/fewshot-{split}-*.tar

Folders inside CLASS may have any depth; validation may be called val. A sample of shards says its class in its json
member: {"class": index, "name": class name}.
"""

import csv
import glob
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from braceexpand import braceexpand

from pretrain.config import ConfigError
from pretrain.data.decode import IMAGES
from pretrain.data.index import resolve
from pretrain.data.order import Place
from pretrain.data.shards import Store
from pretrain.dist import hash64

SPLITS = ("train", "validation", "test")
SHORT = {"validation": ("val",)}  #: what a split is called, too
SHARES = {"test": 0.3, "validation": 0.2}  #: of a class that nobody has split: those of CoOp's splits
FORMS = (
    "a folder of CLASS/*.jpg or of train/CLASS/*.jpg and test/CLASS/*.jpg, a table .csv with the columns path and "
    "class, one of CoOp's split_zhou_*.json, a folder of shards {split}-*.tar, or a pattern with {split} in it, e.g. "
    "icons/fewshot-{split}-*.tar"
)


class Sample(NamedTuple):
    """One labelled picture that has not been read yet."""

    key: str  #: what draws depend on: never where the data lies
    target: int
    name: str
    read: Callable[[], dict[str, bytes]]  #: its members: extension -> bytes

    @property
    def label(self) -> dict[str, Any]:
        """What its json member says."""
        return {"class": self.target, "name": self.name, "source": self.key}


Found = dict[str, list[Sample]]  #: by split
#: split: a folder of train/ and test/; whole: a folder that nobody has split
Form = Literal["json", "table", "split", "whole", "shards"]


def find(data: str, images: str | None = None) -> Found:
    """Return the labelled pictures of each split; `images` is the folder that a json's paths start from.

    Raises:
        ConfigError: no such data, no train or test split, or samples without a class.
        ShardError: a shard cannot be read.
    """
    found = _read(data, images, cut)
    refuse_empty(found, data, FORMS)
    return found


def scored(data: str) -> list[Sample]:
    """Return the pictures of data that nothing is trained on: its test split, or all where nobody has split them.

    Raises:
        ConfigError: no such data, nothing to score, or samples without a class.
        ShardError: a shard cannot be read.
    """
    found = _read(data, None, lambda samples: {**{split: [] for split in SPLITS}, "test": list(samples)})
    refuse_empty(found, data, FORMS, splits=("test",))
    return found["test"]


def _read(data: str, images: str | None, cut: Callable[[Iterable[Sample]], Found]) -> Found:
    path = Path(data)
    match form(data, images, json="split_zhou_*.json"):
        case "json":
            return _zhou(path, Path(images) if images else path.parent)
        case "table":
            return _table(path, cut)
        case "split":
            return {split: _pictures(split_folder(path, split), _folders(path / "train")) for split in SPLITS}
        case "whole":
            return cut(_pictures(path, _folders(path)))
        case "shards":
            return {split: _labelled(shards(data, split)) for split in SPLITS}


def form(data: str, images: str | None = None, *, json: str = "") -> Form:
    """Return which form data has; `json` is what those files are called that `images` may stand beside.

    Raises:
        ConfigError: `images` beside another form.
    """
    path = Path(data)
    if images is not None and path.suffix != ".json":
        raise ConfigError(f"task.images: is for {json}, not for {data!r}; leave it out")
    if path.suffix in (".json", ".csv"):
        return "json" if path.suffix == ".json" else "table"
    if path.is_dir() and (path / "train").is_dir():
        return "split"
    return "whole" if path.is_dir() and not any(path.glob("*.tar")) else "shards"


def refuse_empty(
    found: Mapping[str, Sequence[Any]], data: str, forms: str, *, splits: Sequence[str] = ("train", "test")
) -> None:
    """Raise a ConfigError where there is nothing to train on, or to score."""
    for split in splits:
        if not found[split]:
            raise ConfigError(f"task.data: {data!r} has no {split} split; give {forms}")


def shards(data: str, split: str) -> list[str]:
    """Return the shards of a split, sorted.

    Raises:
        ConfigError: neither a folder nor a pattern.
    """
    pattern = str(Path(data) / "{split}-*.tar") if Path(data).is_dir() else data
    if "{split}" not in pattern:
        raise ConfigError(f"task.data: {data!r} is not there, or none of these: {FORMS}")
    found = (_matching(pattern.replace("{split}", name)) for name in (split, *SHORT.get(split, ())))
    return next((paths for paths in found if paths), [])


def _matching(pattern: str) -> list[str]:
    return sorted(path for word in braceexpand(pattern) for path in glob.glob(word))


def split_folder(folder: Path, split: str) -> Path:
    """Return where a split lies in a folder of splits."""
    there = (folder / name for name in (split, *SHORT.get(split, ())))
    return next((path for path in there if path.is_dir()), folder / split)


def are_shards(data: str) -> bool:
    """Return whether the data are shards already, so that a whole split need not be written again."""
    return form(data) == "shards"


def cut(samples: Iterable[Sample]) -> Found:
    """Return samples that nobody has split as train, validation and test: each class in fixed shares, by hash.

    A class of one sample has it in train, one of two or more has one in test at least.
    """
    members: dict[int, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda s: (hash64("split", s.key), s.key)):
        members[sample.target].append(sample)
    found: Found = {split: [] for split in SPLITS}
    for group in members.values():
        test = max(round(SHARES["test"] * len(group)), int(len(group) > 1))
        validation = test + round(SHARES["validation"] * len(group))
        found["test"] += group[:test]
        found["validation"] += group[test:validation]
        found["train"] += group[validation:]
    return found


def count(paths: list[str]) -> int:
    """Return the number of samples of shards."""
    return sum(resolve(paths).sizes) if paths else 0


def spoken(name: str) -> str:
    """Return a class name as a prompt says it."""
    return name.strip().replace("_", " ")


class Picture(NamedTuple):
    """A file that has not been read yet."""

    path: Path
    extension: str

    def __call__(self) -> dict[str, bytes]:
        return {self.extension: self.path.read_bytes()}


def picture(path: Path, where: str) -> Picture:
    """Return a file, which must be there.

    Raises:
        ConfigError: it is not, or it is no picture.
    """
    extension = path.suffix[1:].lower()
    if extension not in IMAGES:
        raise ConfigError(f"{where}: {path} has no extension of a picture ({', '.join(IMAGES)})")
    if not path.is_file():
        raise ConfigError(f"{where}: there is no picture {path}; check what its path starts from")
    return Picture(path, extension)


def _folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted.

    Raises:
        ConfigError: one without a picture.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    bare = next((name for name in names if next(_images(folder / name), None) is None), None)
    if bare is not None:
        raise ConfigError(
            f"task.data: {folder / bare} holds no picture ({', '.join(IMAGES)}); every folder in {folder} is a class"
        )
    return names


def _images(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix[1:].lower() in IMAGES and not hidden:
            yield path


def _pictures(folder: Path, names: list[str]) -> list[Sample]:
    """Return the pictures of class folders, numbered by the sorted names of train's folders."""
    out = []
    for own in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not own.is_dir() or own.name.startswith("."):
            continue
        for path in _images(own):
            if own.name not in names:
                raise ConfigError(f"task.data: {own} has no folder of its name in train")
            key = path.relative_to(folder).as_posix()
            out.append(Sample(key, names.index(own.name), spoken(own.name), Picture(path, path.suffix[1:].lower())))
    return out


def table(path: Path, needed: tuple[str, str]) -> tuple[list[dict[str, str]], set[str]]:
    """Return the rows of a CSV and its columns.

    Raises:
        ConfigError: it cannot be read, or lacks a column, or a row has not as many cells as there are columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"task.data: {path} cannot be read ({error})") from error
    columns = set(rows[0]) if rows else set()
    if not set(needed) <= columns:
        raise ConfigError(
            f"task.data: {path} needs the columns {' and '.join(needed)}, has {sorted(map(str, columns))}"
        )
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():  # which is how the csv module says more or fewer
            raise ConfigError(
                f"task.data: line {number} of {path} has not as many cells as the first line; put a cell that holds a "
                "comma in double quotes"
            )
    return rows, columns


def _table(path: Path, cut: Callable[[Iterable[Sample]], Found]) -> Found:
    """Return the pictures of a table; classes are numbered by their sorted names."""
    rows, columns = table(path, ("path", "class"))
    names = sorted({(row["class"] or "").strip() for row in rows})
    if "" in names:
        raise ConfigError(f"task.data: {path} has a row without a class")
    found: Found = {split: [] for split in SPLITS}
    for number, row in enumerate(rows, 2):
        where, name = f"task.data: line {number} of {path}", row["class"].strip()
        sample = Sample(row["path"], names.index(name), spoken(name), picture(path.parent / row["path"], where))
        split = {"val": "validation"}.get(given := row.get("split") or "train", given)
        if split not in SPLITS:
            raise ConfigError(f"{where}: split is {given!r}, expected one of {', '.join(SPLITS)}")
        found[split].append(sample)
    return found if "split" in columns else cut(found["train"])


def _zhou(path: Path, images: Path) -> Found:
    """Return CoOp's splits: {"train" | "val" | "test": [[path, class index, class name], ...]}."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = {split: [(str(p), int(c), str(n)) for p, c, n in tree[split]] for split in ("train", "val", "test")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'task.data: {path} must hold {{"train" | "val" | "test": [[path, class index, name], ...]}} ({error})'
        ) from error
    where = f"{path}, task.images"
    return {
        split: [Sample(p, c, spoken(n), picture(images / p, where)) for p, c, n in rows[key]]
        for split, key in zip(SPLITS, ("train", "val", "test"))
    }


class _Member(NamedTuple):
    store: Store
    place: Place

    def __call__(self) -> dict[str, bytes]:
        fields = self.store.read(self.place).fields
        return {name: data for name, data in fields.items() if name in IMAGES}


def _labelled(paths: list[str]) -> list[Sample]:
    """Return the samples of shards with the class that their json member gives."""
    if not paths:
        return []
    catalog = resolve(paths)
    store = Store(catalog, seed=0)
    out, given = [], []
    for shard, size in enumerate(catalog.sizes):
        for member in range(size):
            place = Place(0, 0, shard, member)
            record = store.read(place)
            tree = _class(record.fields, record.shard, record.key)
            out.append(Sample(record.key, tree["class"], spoken(tree["name"]), _Member(store, place)))
            given.append(tree.get("source"))
    if all(isinstance(key, str) for key in given) and len(set(given)) == len(given):
        return [s._replace(key=key) for s, key in zip(out, given)]  # made of one's own pictures: they draw as these do
    return out


def _class(fields: dict[str, bytes], shard: str, key: str) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(fields["json"])
        target, name = tree["class"], tree["name"]
        if type(target) is not int or not isinstance(name, str) or not name.strip():
            raise ValueError(f"class={target!r}, name={name!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f'task.data: sample {key!r} of {shard}: its json must hold {{"class": index, "name": "..."}} ({error})'
        ) from None
    return tree

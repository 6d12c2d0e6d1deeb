"""From what a user has to shards of labelled pictures: a folder of class folders, or shards; k samples a class.

    FOLDER/train/CLASS/*.jpg  test/CLASS/*.jpg  [validation/CLASS/*.jpg]
    FOLDER/train-*.tar  test-*.tar  [validation-*.tar]         or a pattern such as icons/fewshot-{split}-*.tar

A sample's json member holds {"class": index, "name": class name}. What is drawn or converted is written into the run's
folder as small shards, so that order, resume and quarantine are those of pretraining.
"""

import glob
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from pretrain.config import ConfigError
from pretrain.data import format
from pretrain.data.decode import IMAGES
from pretrain.data.index import resolve
from pretrain.data.order import Place
from pretrain.data.shards import Store
from pretrain.dist import hash64

SPLITS = ("train", "validation", "test")
SHARD_SIZE = 1000


class Splits(NamedTuple):
    """Shards of every split, and the class names by index; validation may be empty."""

    train: list[str]
    validation: list[str]
    test: list[str]
    names: list[str]
    samples: dict[str, int]


class Sample(NamedTuple):
    """One labelled picture that has not been read yet."""

    key: str  #: what draws depend on: never where the data lies
    target: int
    name: str
    read: Callable[[], dict[str, bytes]]  #: its members: extension -> bytes


def find(data: str) -> dict[str, list[Sample]]:
    """Return the labelled pictures of each split.

    Raises:
        ConfigError: no such data, no train or test split, or samples without a class.
        ShardError: a shard cannot be read.
    """
    folder = Path(data)
    if folder.is_dir() and (folder / "train").is_dir():
        found = {split: _pictures(folder, split) for split in SPLITS}
    else:
        pattern = str(folder / "{split}-*.tar") if folder.is_dir() else data
        if "{split}" not in pattern:
            raise ConfigError(
                f"task.data: {data!r} is neither a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, nor a folder of "
                "shards, nor a pattern with {split} in it, e.g. icons/fewshot-{split}-*.tar"
            )
        found = {split: _labelled(shards(pattern, split)) for split in SPLITS}
    for split in ("train", "test"):
        if not found[split]:
            raise ConfigError(f"task.data: {data!r} has no {split} split; check the path and its names")
    return found


def shards(pattern: str, split: str) -> list[str]:
    """Return the shards of a split, sorted."""
    words = braceexpand(pattern.replace("{split}", split))
    return sorted(path for word in words for path in glob.glob(word))


def class_names(samples: Iterable[Sample]) -> list[str]:
    """Return the names by index.

    Raises:
        ConfigError: an index with two names, two indexes with one name, or a gap.
    """
    names: dict[int, str] = {}
    for s in samples:
        if names.setdefault(s.target, s.name) != s.name:
            raise ConfigError(f"task.data: class {s.target} is called {names[s.target]!r} and {s.name!r}; name it once")
    if sorted(names) != list(range(len(names))):
        raise ConfigError(f"task.data: class indexes must be 0 .. {len(names) - 1} without gaps, got {sorted(names)}")
    if len(names) < 2 or len(set(names.values())) < len(names):
        raise ConfigError(f"task.data: needs two or more classes with different names, got {sorted(names.values())}")
    return [names[index] for index in range(len(names))]


def draw(samples: Iterable[Sample], count: int | None, *, seed: int) -> list[Sample]:
    """Return `count` samples of every class (all of a smaller one), chosen by hash: fewer shots are a part of more."""
    members: dict[int, list[Sample]] = defaultdict(list)
    for sample in ranked(samples, seed=seed):
        members[sample.target].append(sample)
    return ranked((s for group in members.values() for s in group[:count]), seed=seed)


def hold_out(samples: Iterable[Sample], count: int, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return (rest, held): the last `count` samples by hash of every class that has more than twice as many."""
    members: dict[int, list[Sample]] = defaultdict(list)
    for sample in ranked(samples, seed=seed):
        members[sample.target].append(sample)
    cut = {target: len(group) - count * (len(group) > 2 * count) for target, group in members.items()}
    rest = [s for target, group in members.items() for s in group[: cut[target]]]
    return rest, [s for target, group in members.items() for s in group[cut[target] :]]


def ranked(samples: Iterable[Sample], *, seed: int) -> list[Sample]:
    """Return samples in an order that mixes the classes and depends on seed and keys alone."""
    return sorted(samples, key=lambda s: (hash64(seed, "draw", s.key), s.key))


def write(samples: Sequence[Sample], folder: Path, split: str) -> list[str]:
    """Write samples as shards `split-00000.tar` ...; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for at in range(0, len(samples), SHARD_SIZE):
        path = folder / f"{split}-{at // SHARD_SIZE:05d}.tar"
        with format.ShardWriter(path) as writer:
            for number, sample in enumerate(samples[at : at + SHARD_SIZE], at):
                tree = {"class": sample.target, "name": sample.name, "source": sample.key}
                label = json.dumps(tree, ensure_ascii=False).encode()
                writer.add(f"{split}-{number:06d}", {**sample.read(), "json": label})
        paths.append(str(path))
    return paths


def _pictures(folder: Path, split: str) -> list[Sample]:
    """Return the pictures below FOLDER/SPLIT, one class a folder, numbered by the sorted names of train's folders."""
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    root = folder / split
    out = []
    for path in sorted(root.glob("*/*")) if root.is_dir() else []:
        extension = path.suffix[1:].lower()
        if extension not in IMAGES or path.name.startswith("."):
            continue
        if path.parent.name not in names:
            raise ConfigError(f"task.data: {path.parent} has no folder of its name in {folder / 'train'}")
        key = path.relative_to(root).as_posix()
        name = path.parent.name.replace("_", " ")
        out.append(Sample(key, names.index(path.parent.name), name, _Picture(path, extension)))
    return out


class _Picture(NamedTuple):
    path: Path
    extension: str

    def __call__(self) -> dict[str, bytes]:
        return {self.extension: self.path.read_bytes()}


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
    out = []
    for shard, size in enumerate(catalog.sizes):
        for member in range(size):
            place = Place(0, 0, shard, member)
            record = store.read(place)
            target, name = _class(record.fields, record.shard, record.key)
            out.append(Sample(record.key, target, name, _Member(store, place)))
    return out


def _class(fields: dict[str, bytes], shard: str, key: str) -> tuple[int, str]:
    try:
        tree = json.loads(fields["json"])
        target, name = tree["class"], tree["name"]
        if type(target) is not int or not isinstance(name, str) or not name.strip():
            raise ValueError(f"class={target!r}, name={name!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f'task.data: sample {key!r} of {shard}: its json must hold {{"class": index, "name": "..."}} ({error})'
        ) from None
    return target, name.strip().replace("_", " ")

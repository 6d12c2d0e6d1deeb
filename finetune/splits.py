"""From labelled samples to the shards of a run: k samples a class, halves of the classes, splits kept for later starts.

What is drawn or converted is written into the run's folder as small shards, so that order, resume and quarantine are
those of pretraining. All draws are by hash of seed and key.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from finetune.sources import Sample
from pretrain import dist
from pretrain.config import ConfigError
from pretrain.data import format
from pretrain.data.format import ShardError, write_atomic
from pretrain.dist import hash64

SHARD_SIZE = 1000
FILE = "splits.json"


class Part(NamedTuple):
    """Samples that are scored beside the test split, and the class names among which they are told apart."""

    shards: list[str]
    names: list[str]


class Splits(NamedTuple):
    """Shards of every split, and the class names by index; validation may be empty."""

    train: list[str]
    validation: list[str]
    test: list[str]
    names: list[str]
    samples: dict[str, int]
    more: dict[str, Part] = {}  # noqa: RUF012  #: what is scored beside test, by name: classes never trained on, a shift


class Written(Protocol):
    """What can be written into a shard."""

    @property
    def key(self) -> str: ...
    @property
    def read(self) -> Callable[[], dict[str, bytes]]: ...
    @property
    def label(self) -> dict[str, Any]: ...


AnyWritten = TypeVar("AnyWritten", bound=Written)


def prepared(folder: Path, mark: Mapping[str, Any], make: Callable[[], Splits]) -> Splits:
    """Return the splits that `make` makes on rank 0, or that an earlier start of an equal `mark` has left in `folder`.

    All ranks call it.

    Raises:
        ConfigError: on every rank, where `make` cannot make them.
    """
    problem, found = None, None
    if dist.is_main():
        try:
            found = _read(folder / FILE, mark)
            if found is None:
                (folder / FILE).unlink(missing_ok=True)  # it would name the new shards the old ones
                found = make()
                folder.mkdir(parents=True, exist_ok=True)
                tree = {"config": dict(mark), "splits": found._asdict()}
                write_atomic(folder / FILE, json.dumps(tree, indent=1).encode())
        except (ConfigError, ShardError, OSError) as error:
            problem = str(error)
    problem, found = dist.broadcast_object((problem, found))
    if problem:
        raise ConfigError(problem)
    return Splits(*found)


def _read(stamp: Path, mark: Mapping[str, Any]) -> Splits | None:
    if not stamp.is_file():
        return None
    tree = json.loads(stamp.read_bytes())
    if tree["config"] != mark:
        return None
    found = Splits(**tree["splits"])
    found = found._replace(more={name: Part(*part) for name, part in found.more.items()})
    paths = [*found.train, *found.validation, *found.test, *(p for part in found.more.values() for p in part.shards)]
    return found if all(Path(path).is_file() for path in paths) else None


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


def halves(names: list[str]) -> tuple[range, range]:
    """Return the class indexes of the base half and of the new half: CoOp's, the first one larger by one at most."""
    middle = -(-len(names) // 2)
    return range(middle), range(middle, len(names))


def among(samples: Iterable[Sample], classes: range) -> list[Sample]:
    """Return the samples of some classes, which are numbered from 0 anew."""
    return [s._replace(target=s.target - classes.start) for s in samples if s.target in classes]


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


def ranked(samples: Iterable[AnyWritten], *, seed: int) -> list[AnyWritten]:
    """Return samples in an order that mixes the classes and depends on seed and keys alone."""
    return sorted(samples, key=lambda s: (hash64(seed, "draw", s.key), s.key))


def write(samples: Sequence[Written], folder: Path, split: str) -> list[str]:
    """Write samples as shards `split-00000.tar` ...; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for at in range(0, len(samples), SHARD_SIZE):
        path = folder / f"{split}-{at // SHARD_SIZE:05d}.tar"
        with format.ShardWriter(path) as writer:
            for number, sample in enumerate(samples[at : at + SHARD_SIZE], at):
                label = json.dumps(sample.label, ensure_ascii=False).encode()
                writer.add(f"{split}-{number:06d}", {**sample.read(), "json": label})
        paths.append(str(path))
    return paths

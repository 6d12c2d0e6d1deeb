"""What tasks that name a picture's class share: their data as splits, halves of the classes, and top-1 accuracy.

Shapes: N = pictures, K = classes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from torch import Tensor

from finetune import sources, splits
from finetune.sources import Found, Sample
from finetune.splits import Part, Splits
from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.metrics.classification import top_k
from pretrain.metrics.interval import Score, proportion

NEW, SHIFT = "new", "shift"  #: what is scored beside the test split


class Data(Section):
    """The keys of `task:` that say which pictures and classes."""

    data: str  #: see finetune/sources.py: FOLDER of CLASS/*.jpg, of train/ and test/, a .csv, a split_zhou json, shards
    images: str | None = None  #: the folder that a split_zhou json's paths start from; null: the json's own
    #: base: train on the first half of the classes, score both halves apart (CoOp's); new: the second half alone
    classes: Literal["all", "base", "new"] = "all"
    #: pictures of the same classes in another style, in any form of `data`: its test split is scored, too, or all of it
    #: where nobody has split it
    shift: str | None = None
    seed: int = 1  #: which samples are drawn or held out; papers report the mean over 1, 2 and 3


class Naming:
    """What tasks that name a picture's class declare alike; stands before the base of tasks."""

    kind = "classify"
    reader = "classify"
    metric = "accuracy"

    def score(self, answer: Callable[[Batch], Tensor], batches: Iterator[Batch], names: list[str]) -> Score:
        """Return top-1 accuracy; equal logits count against us."""
        return accuracy(answer, batches)


def prepare(folder: Path, data: Data, *, shots: int | None, few: int | None) -> Splits:
    """Return the splits of a run; what is drawn or converted is written to `folder`, a later start finds it there.

    Args:
        folder: of the run.
        data: which pictures and classes.
        shots: training samples of a class; None: all.
        few: validation samples of a class; None: all, or a tenth of train where there is no validation split.

    Raises:
        ConfigError: the data is not what the task needs.
    """
    mark = {**data.model_dump(include=set(Data.model_fields)), "shots": shots}
    return splits.prepared(folder, mark, lambda: _make(folder, data, shots, few))


def _make(folder: Path, data: Data, shots: int | None, few: int | None) -> Splits:
    found = sources.find(data.data, data.images)
    refuse_unknown(found)
    names = splits.class_names(found["train"])
    base, new = splits.halves(names)
    if data.classes != "all" and len(new) < 2:
        raise ConfigError(f"task.classes: {len(names)} classes have no two halves of two or more; use all")
    classes = {"all": range(len(names)), "base": base, "new": new}[data.classes]
    train, validation, test = (splits.among(found[split], classes) for split in sources.SPLITS)
    if not validation:
        train, validation = splits.hold_out(train, few or max(1, len(train) // (10 * len(classes))), seed=data.seed)
    chosen = {
        "train": splits.draw(train, shots, seed=data.seed),
        "validation": splits.draw(validation, few, seed=data.seed),
    }
    paths = {split: splits.write(samples, folder, split) for split, samples in chosen.items()}
    more = {}
    if data.classes == "base":
        more[NEW] = Part(_whole(splits.among(found["test"], new), folder, NEW), [names[c] for c in new])
    own = [names[c] for c in classes]
    if data.shift:
        more[SHIFT] = Part(_whole(_shifted(data.shift, own), folder, SHIFT), own)
    ready = data.classes == "all" and sources.are_shards(data.data)
    paths["test"] = sources.shards(data.data, "test") if ready else _whole(test, folder, "test")
    counts = {split: len(samples) for split, samples in chosen.items()} | {"test": len(test)}
    return Splits(**paths, names=own, samples=counts, more=more)


def _whole(samples: list[Sample], folder: Path, split: str) -> list[str]:
    return splits.write(sorted(samples, key=lambda s: s.key), folder, split)


def _shifted(data: str, names: list[str]) -> list[Sample]:
    """Return the samples of a shift, its classes numbered as `names` are.

    Raises:
        ConfigError: it has no sample of these classes.
    """
    samples = [s._replace(target=names.index(s.name)) for s in sources.scored(data) if s.name in names]
    if not samples:
        raise ConfigError(f"task.shift: {data!r} has no picture of a class of task.data; classes are matched by name")
    return samples


def refuse_unknown(found: Found) -> None:
    """Raise a ConfigError where a sample is of a class that train does not have, or calls otherwise."""
    names = {s.target: s.name for s in reversed(found["train"])}
    for split in ("validation", "test"):
        wrong = next((s for s in found[split] if names.get(s.target) != s.name), None)
        if wrong is not None:
            has = f"calls it {names[wrong.target]!r}" if wrong.target in names else "has none"
            raise ConfigError(
                f"task.data: {split} sample {wrong.key!r} is of class {wrong.target} ({wrong.name}), train {has}"
            )


def accuracy(answer: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> Score:
    """Return top-1 accuracy of logits [N, K] over all ranks' batches; equal logits count against us."""
    hits = count = 0
    for batch in batches:
        logits_NK = answer(batch)
        own = len(batch) - batch.filler
        if own:
            assert batch.target_B is not None, "the classify reader gives classes"
            found = top_k(logits_NK[:own].float(), batch.target_B[:own], 1)
            hits, count = hits + round(found.value * own), count + own
    parts = dist.gather_objects((hits, count))
    return proportion(sum(part[0] for part in parts), sum(part[1] for part in parts))

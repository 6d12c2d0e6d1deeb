"""Name what a picture shows, from a handful of examples a class (the protocol of CoOp, Zhou et al. 2022).

k samples of every class, drawn by hash(seed, key) from the train split; min(k, 4) of validation, which only choices of
hyper-parameters see; the whole test split is scored.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from finetune import splits
from finetune.splits import Splits
from finetune.tasks import base
from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data.format import ShardError, write_atomic
from pretrain.metrics.classification import top_k
from pretrain.metrics.interval import Score, proportion

VALIDATION = 4


class Config(base.Config):
    """`task:` of few-shot classification."""

    data: str  #: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, one of shards, or a pattern with {split}
    shots: int | None = Field(default=16, gt=0)  #: training samples a class; null: all
    seed: int = 1  #: which samples are drawn


class Task(base.Task):
    """Few-shot classification."""

    kind = "classify"
    reader = "classify"
    metric = "accuracy"
    config: Config

    def prepare(self, folder: Path) -> Splits:
        """Return the splits; drawn samples are written as shards and used again by a later start.

        Raises:
            ConfigError: the data is not what the task needs.
        """
        problem, found = None, None
        if dist.is_main():
            try:
                found = self._prepare(folder)
            except (ConfigError, ShardError, OSError) as error:
                problem = str(error)
        problem, found = dist.broadcast_object((problem, found))
        if problem:
            raise ConfigError(problem)
        return Splits(*found)

    def _prepare(self, folder: Path) -> Splits:
        config = self.config
        mark = {"data": config.data, "shots": config.shots, "seed": config.seed}
        stamp = folder / "splits.json"
        if stamp.is_file():
            tree = json.loads(stamp.read_bytes())
            if tree["config"] == mark:
                return Splits(**tree["splits"])
        found = splits.find(config.data)
        names = splits.class_names(found["train"])
        self._refuse_unknown(found, len(names))
        few = min(config.shots or VALIDATION, VALIDATION)
        train, validation = found["train"], found["validation"]
        if not validation:
            train, validation = splits.hold_out(train, few, seed=config.seed)
        chosen = {
            "train": splits.draw(train, config.shots, seed=config.seed),
            "validation": splits.draw(validation, few if config.shots else None, seed=config.seed),
            "test": sorted(found["test"], key=lambda s: s.key),
        }
        paths = {split: splits.write(samples, folder, split) for split, samples in chosen.items()}
        out = Splits(**paths, names=names, samples={split: len(samples) for split, samples in chosen.items()})
        write_atomic(stamp, json.dumps({"config": mark, "splits": out._asdict()}, indent=1).encode())
        return out

    @staticmethod
    def _refuse_unknown(found: dict[str, list[splits.Sample]], classes: int) -> None:
        for split in ("validation", "test"):
            wrong = next((s for s in found[split] if s.target >= classes), None)
            if wrong is not None:
                raise ConfigError(
                    f"task.data: {split} sample {wrong.key!r} is of class {wrong.target} ({wrong.name}), train has none"
                )

    def score(self, answer: base.Answer, batches: Iterator[Batch], names: list[str]) -> Score:
        """Return top-1 accuracy; equal logits count against us."""
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

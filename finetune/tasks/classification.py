"""Name what a picture shows, trained on the whole training set (the supervised protocol of Radford et al. 2021).

All of train is used; without a validation split a tenth of it is held out by hash, for methods that choose something.
"""

from collections.abc import Iterator
from pathlib import Path

from finetune import classes
from finetune.splits import Splits
from finetune.tasks import base
from pretrain.batch import Batch
from pretrain.metrics.interval import Score


class Config(base.Config, classes.Data):
    """`task:` of classification."""

    seed: int = 1  #: which samples are held out where there is no validation split


class Task(base.Task):
    """Classification."""

    kind = "classify"
    reader = "classify"
    metric = "accuracy"
    config: Config

    def prepare(self, folder: Path) -> Splits:
        """Return the splits.

        Raises:
            ConfigError: the data is not what the task needs.
        """
        return classes.prepare(folder, self.config, shots=None, few=None, seed=self.config.seed)

    def score(self, answer: base.Answer, batches: Iterator[Batch], names: list[str]) -> Score:
        """Return top-1 accuracy; equal logits count against us."""
        return classes.accuracy(answer, batches)

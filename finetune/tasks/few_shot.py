"""Name what a picture shows, from a handful of examples a class (the protocol of CoOp, Zhou et al. 2022).

k samples of every class, drawn by hash(seed, key) from the train split; min(k, 4) of validation, which only choices of
hyper-parameters see; the whole test split is scored. `classes: base` is its protocol from base to new classes.
"""

from pathlib import Path

from pydantic import Field

from finetune import classes
from finetune.splits import Splits
from finetune.tasks import base

VALIDATION = 4


class Config(base.Config, classes.Data):
    """`task:` of few-shot classification."""

    shots: int | None = Field(default=16, gt=0)  #: training samples a class, 1, 2, 4, 8 and 16 in papers; null: all


class Task(classes.Naming, base.Task):
    """Few-shot classification."""

    config: Config

    def prepare(self, folder: Path) -> Splits:
        """Return the splits; drawn samples are written as shards and used again by a later start.

        Raises:
            ConfigError: the data is not what the task needs.
        """
        shots = self.config.shots
        few = min(shots, VALIDATION) if shots else None
        return classes.prepare(folder, self.config, shots=shots, few=few)

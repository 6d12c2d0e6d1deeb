"""Name what a picture shows, trained on the whole training set (the supervised protocol of Radford et al. 2021).

All of train is used; without a validation split a tenth of it is held out by hash, for methods that choose something.
"""

from pathlib import Path

from finetune import classes
from finetune.splits import Splits
from finetune.tasks import base


class Config(base.Config, classes.Data):
    """`task:` of classification."""


class Task(classes.Naming, base.Task):
    """Classification."""

    config: Config

    def prepare(self, folder: Path) -> Splits:
        """Return the splits.

        Raises:
            ConfigError: the data is not what the task needs.
        """
        return classes.prepare(folder, self.config, shots=None, few=None)

"""What a task is: splits, a reader, the set of answers and a metric.

Shapes: N = pictures, K = classes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from finetune.splits import Splits
from pretrain.batch import Batch
from pretrain.config import Section
from pretrain.metrics.interval import Score

Answer = Callable[[Batch], Tensor]  #: logits [N, K] of a batch; called equally often on all ranks


class Config(Section):
    """Base of every task's section."""

    name: str  #: a module of finetune/tasks
    batch_size: int = Field(default=64, gt=0)  #: of evaluations, per rank
    #: sentences of the zero-shot score that stands beside: a set of pretrain/data/prompts.py, or templates with {}
    templates: str | list[str] = Field(default_factory=lambda: ["a photo of a {}."])


class Task:
    """Base of every task."""

    kind: ClassVar[str]  #: what it wants of a method: classify, retrieve
    reader: ClassVar[str]  #: a module of pretrain/data/readers
    options: ClassVar[dict[str, Any]] = {}  #: of that reader
    metric: ClassVar[str]  #: the name of its score in evals.jsonl

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, folder: Path) -> Splits:
        """Return the splits; whatever has to be written for them goes to `folder`. All ranks call it.

        Raises:
            ConfigError: the data is not what the task needs.
        """
        raise NotImplementedError

    def scores(self, answer: Any, batches: Iterator[Batch], names: list[str]) -> dict[str, Score]:
        """Return scores by name, the one that stands for the task first; the same on every rank."""
        return {self.metric: self.score(answer, batches, names)}

    def score(self, answer: Answer, batches: Iterator[Batch], names: list[str]) -> Score:
        """Return the score over all ranks' batches, the same on every rank."""
        raise NotImplementedError

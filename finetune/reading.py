"""How a run reads its splits: as pictures, or as features where frozen towers make these once for all.

What an evaluation sees never changes, so it comes from the cache wherever the towers are frozen. Training does so where
its pictures are not augmented (no data.augment); else each step encodes its own views.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from finetune import encoded
from finetune.encoded import Encoded
from finetune.recipe import Recipe
from finetune.tasks.base import Task
from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import loader
from pretrain.data.transforms import Augment
from pretrain.pretrained import Pretrained

KINDS = {"features": ("image",), "pooled": ("image", "pooled"), "pixels": ()}  #: what is kept, by Method.pictures_by


class Reading:
    """The batches of one run on this rank."""

    def __init__(self, recipe: Recipe, task: Task, base: Pretrained, *, pictures_by: str, device: torch.device) -> None:
        """`pictures_by` is the method's; where it is not `pixels`, the base's tower of pictures must stay as it is."""
        self.recipe, self.task, self.base, self.device = recipe, task, base, device
        self.kinds = KINDS[pictures_by] if recipe.data.features == "cached" else ()
        self._tables: dict[tuple[str, ...], Encoded] = {}

    @property
    def trains_on_tables(self) -> bool:
        """Return whether training reads features, too."""
        return bool(self.kinds) and self.recipe.data.augment is None

    @property
    def note(self) -> str:
        """What to say of it; nothing where a method reads pixels."""
        if not self.kinds or self.trains_on_tables:
            return ""
        return (
            "data.augment: training encodes every picture anew in each step; without it, features would be computed "
            "once and kept"
        )

    def encode(self, shards: list[str]) -> None:
        """Make sure of the features of a split, before an engine takes the model apart. All ranks call it."""
        if self.kinds and shards and tuple(shards) not in self._tables:
            self._tables[tuple(shards)] = encoded.encode(
                shards,
                self.kinds,
                base=self.base,
                reader=self.task.reader,
                access=self.recipe.data,
                batch_size=self.recipe.task.batch_size,
                workers=self.recipe.data.workers,
                device=self.device,
            )

    def scan(self, shards: list[str], split: str, *, views: int = 0) -> Iterator[Batch]:
        """Return this rank's part of a split, in order, on the device; all ranks get equally many batches.

        With `views`, so many passes one after the other, each augmented as training is; one where it is not.

        Raises:
            ConfigError: the data has no such split.
        """
        if not shards:
            raise ConfigError(f"task.data: has no {split} split, and too few samples to take one from train")
        augment, seed = self.recipe.data.augment, self.recipe.run.seed
        if views and augment is not None:
            passes = (self._pass(shards, augment=augment, epoch=epoch, seed=seed) for epoch in range(views))
            return itertools.chain.from_iterable(passes)
        if not self.kinds:
            return self._pass(shards)
        self.encode(shards)
        table = self._tables[tuple(shards)].scan(self.recipe.task.batch_size)
        return (batch.to(self.device) for batch in table)

    def _pass(self, shards: list[str], **how: Any) -> Iterator[Batch]:
        """Return one pass over pictures."""
        batches = loader.scan(
            shards,
            reader=self._reader(),
            transform=self.base.transform,
            composer=self.base.composer,
            batch_size=self.recipe.task.batch_size,
            rank=dist.rank(),
            world=dist.world(),
            workers=self.recipe.data.workers,
            access=self.recipe.data,
            **how,
        )
        return (batch.to(self.device) for batch in batches)

    def training(self, shards: list[str]) -> loader.Loader:
        """Return the training batches of this rank."""
        assert self.recipe.train is not None
        given = {**self.recipe.data.model_dump(exclude={"features"}), "shards": shards, "reader": self._reader()}
        if self.recipe.data.augment is None:
            given["decode"] = "exact"  # as evaluations see pictures, and as tables are made of them
        options: dict[str, Any] = {
            "batch_size": self.recipe.train.batch_size,
            "seed": self.recipe.run.seed,
            "transform": self.base.transform,
            "composer": self.base.composer,
            "rank": dist.rank(),
            "world": dist.world(),
        }
        if self.trains_on_tables:
            self.encode(shards)
            return encoded.Loader(self._tables[tuple(shards)], Shards(**given), **options)
        return loader.Loader(Shards(**given), **options)

    def _reader(self) -> dict[str, dict[str, Any]]:
        return {self.task.reader: self.task.options}


class Shards(loader.Config):
    """A loader's section, in which no augmentation is the plain picture."""

    augment: Augment | None = None  # type: ignore[assignment]

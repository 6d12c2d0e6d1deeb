"""Find a picture by its caption and a caption by its picture (Karpathy & Fei-Fei 2015, arXiv:1412.2306).

Training compares pictures and captions of a batch, of several captions one an epoch. Scored are all captions of the
test split: a caption's right pictures are those that have it; for a picture any of its captions counts. Ties count
against us. Shapes: M = pictures, T = different captions, E = joint width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finetune import pairs, sources, splits
from finetune.splits import Splits
from finetune.tasks import base
from pretrain import dist
from pretrain.batch import Batch
from pretrain.evals.base import Features
from pretrain.metrics.interval import Score, proportion
from pretrain.metrics.ranking import ranks_of_pairs


class Config(base.Config):
    """`task:` of retrieval."""

    data: str  #: see finetune/pairs.py: FOLDER of *.jpg beside *.txt, a .csv, Karpathy's json, shards
    images: str | None = None  #: the folder that the json's paths start from; null: the json's own
    k: list[int] = Field(default_factory=lambda: [1, 5, 10], min_length=1)
    lead: str = ""  #: words before every caption of the test split; CLIP's paper says "a photo of"


class Task(base.Task):
    """Retrieval in both directions."""

    kind = "retrieve"
    reader = "caption"
    options: ClassVar[dict[str, Any]] = {"keep_all": True}
    metric = "text_to_image/R@1"
    config: Config

    def prepare(self, folder: Path) -> Splits:
        """Return the splits; shards are taken as they are, other forms are written as shards.

        Raises:
            ConfigError: the data is not what the task needs.
        """
        mark = {"data": self.config.data, "images": self.config.images}
        return splits.prepared(folder, mark, lambda: self._make(folder))

    def _make(self, folder: Path) -> Splits:
        found = pairs.find(self.config.data, self.config.images)
        if found is None:
            paths = {split: sources.shards(self.config.data, split) for split in sources.SPLITS}
            return Splits(**paths, names=[], samples={split: sources.count(paths[split]) for split in paths})
        chosen = {split: splits.ranked(group, seed=0) for split, group in found.items()}
        paths = {split: splits.write(group, folder, split) for split, group in chosen.items()}
        return Splits(**paths, names=[], samples={split: len(group) for split, group in chosen.items()})

    def scores(self, answer: Features, batches: Iterator[Batch], names: list[str]) -> dict[str, Score]:
        """Return text_to_image/R@K and image_to_text/R@K over all ranks' batches."""
        image: list[Tensor] = []
        own: list[list[str]] = []
        for batch in batches:
            image.append(answer.of(batch, "image").cpu())
            own += [meta["captions"] for meta in batch.meta[: len(batch) - batch.filler]]
        image_ME = torch.cat([torch.as_tensor(part) for part in dist.gather_objects(torch.cat(image))])
        captions = [lines for part in dist.gather_objects(own) for lines in part]
        lines = sorted({line for group in captions for line in group})
        number = {line: n for n, line in enumerate(lines)}
        spoken = [f"{self.config.lead} {line}".strip() for line in lines]
        text_TE = answer.texts(spoken, batch_size=self.config.batch_size).cpu()
        right_P2 = torch.tensor([(m, number[line]) for m, group in enumerate(captions) for line in group])
        image_T = ranks_of_pairs(text_TE, image_ME, right_P2.flip(1))
        asked_Q = image_T[right_P2[:, 1]]  # every caption of every picture is a query
        found = {"text_to_image": asked_Q, "image_to_text": ranks_of_pairs(image_ME, text_TE, right_P2)}
        return {
            f"{way}/R@{k}": proportion(int((rank_Q < k).sum()), len(rank_Q))
            for way, rank_Q in found.items()
            for k in self.config.k
        }

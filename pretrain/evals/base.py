"""What an eval is, and Features: the predict functions an eval is given, so that it knows no model.

All ranks run an eval together and call the model equally often, as ZeRO-3 requires.
Shapes: N = images or texts, E = joint embedding width.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pretrain import dist
from pretrain.batch import Batch, Example
from pretrain.data import loader
from pretrain.data.compose import Composer
from pretrain.data.remote import Access
from pretrain.data.transforms import Decode, Transform
from pretrain.metrics.interval import Score

log = logging.getLogger("diptych")


class Config(Access):
    """Base of every eval's section."""

    data: str | list[str]  #: shards to score, each sample once
    every_steps: int | None = Field(default=None, gt=0)  #: None: only at the end of the run
    batch_size: int = Field(default=64, gt=0)  #: per rank
    decode: Decode = "exact"  #: fast: as training does; scores then differ from those of other libraries


@dataclass
class Features:
    """A model as evals see it: `run(batch, want)` returns unit-norm features [rows, E] on any rank."""

    run: Callable[[Batch, str], Tensor]
    transform: Transform
    composer: Composer
    device: torch.device | str = "cpu"

    def of(self, batch: Batch, want: str) -> Tensor:
        """Return the features of a batch's own rows (fillers dropped), on the device."""
        with torch.no_grad():
            out_NE = self.run(batch.to(self.device), want)
        return out_NE[: len(batch) - batch.filler]

    def texts(self, lines: list[str], *, batch_size: int) -> Tensor:
        """Return the features of all lines on every rank, [N, E]; the work is split over ranks."""
        share = -(-len(lines) // dist.world())
        padded = lines + lines[:1] * (share * dist.world() - len(lines))
        mine = padded[dist.rank() * share :][:share]
        parts = []
        for start in range(0, share, batch_size):
            batch = self._texts(mine[start : start + batch_size]).to(self.device)
            with torch.no_grad():
                parts.append(self.run(batch, "text"))
        return dist.gather(torch.cat(parts))[: len(lines)]

    def _texts(self, lines: list[str]) -> Batch:
        rows = [self.composer.row(Example(key=line, images=[], suffix=line), []) for line in lines]
        return self.composer.collate(rows)


class Eval:
    """Base of every eval."""

    def __init__(self, config: Any) -> None:
        self.config = config
        #: what a report shows of the last run, as JSON holds it, under the eval's name; set on rank 0 by evals with any
        self.examples: dict[str, Any] | None = None

    def run(self, features: Features) -> dict[str, Score]:
        """Return scores by name, the same on every rank."""
        raise NotImplementedError

    def batches(self, features: Features) -> Iterator[Batch]:
        """Yield this rank's part of the data, equally many batches on all ranks; unusable samples are told."""
        bad: list[dict[str, str]] = []
        for batch in self._scan(features):
            bad += batch.bad
            yield batch
        if bad:
            log.warning(
                "%d samples of %s are unusable and not scored, the first: %s", len(bad), self.config.data, bad[0]
            )

    def _scan(self, features: Features) -> Iterator[Batch]:
        return loader.scan(
            self.config.data,
            reader={"caption": {}},
            transform=features.transform,
            composer=features.composer,
            batch_size=self.config.batch_size,
            rank=dist.rank(),
            world=dist.world(),
            decode=self.config.decode,
            access=self.config,
        )

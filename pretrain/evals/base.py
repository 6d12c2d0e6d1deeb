"""What an eval is, and Features: the predict functions an eval is given, so that it knows no model.

All ranks run an eval together and call the model equally often, as ZeRO-3 requires.
Shapes: N = images or texts, E = joint embedding width, B = rows of a batch, A = candidates.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pretrain import dist, registry
from pretrain.batch import Batch, Example
from pretrain.config import ConfigError
from pretrain.data import instructions, loader, sources, symbols
from pretrain.data.asked import GIVEN, SAID, Asked
from pretrain.data.compose import Composer
from pretrain.data.instructions.base import Instruction
from pretrain.data.regions import Config as Regions
from pretrain.data.remote import Access
from pretrain.data.thumbnail import of_rows
from pretrain.data.transforms import Decode, Transform
from pretrain.metrics.interval import Score
from pretrain.models import candidates
from pretrain.models.base import Memory
from pretrain.models.constraints import Constraint
from pretrain.models.generate import generate
from pretrain.models.writing import Hypothesis, Options

log = logging.getLogger("diptych")

SIDE = 128  # pixels of a picture that a report shows


class Config(Access):
    """Base of every eval's section."""

    data: str | list[str]  #: shards to score, each sample once
    reader: dict[str, dict[str, Any]] = {"caption": {}}  # noqa: RUF012  #: as data.reader
    instruction: dict[str, dict[str, Any]] = {}  # noqa: RUF012  #: as data.instruction: what the model was trained with
    regions: Regions | None = None  #: as data.regions
    every_steps: int | None = Field(default=None, gt=0)  #: None: only at the end of the run
    batch_size: int = Field(default=64, gt=0)  #: per rank
    decode: Decode = "exact"  #: fast: as training does; scores then differ from those of other libraries


@dataclass
class Features:
    """A model as evals see it.

    `run(batch, "image" or "text")` returns unit-norm features [rows, E] on any rank; `run(batch, function)` what
    `function(model, batch)` returns inside the model's forward.
    """

    run: Callable[[Batch, Any], Any]
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

    @cached_property
    def asked(self) -> Asked:
        """Return the composer of batches for `write`, `rank` and `likelihood`."""
        return Asked(self.composer)

    def write(self, batch: Batch, options: Options, *, constraint: Constraint | None = None) -> list[list[Hypothesis]]:
        """Return what the model writes in a batch's own rows.

        Raises:
            ConfigError: the decoder has too few places for what a constraint asks for.
        """
        room = self.asked.room(batch)
        if constraint is not None and constraint.longest > min(room):
            raise ConfigError(
                f"evals: what is to be written has {constraint.longest} tokens, the model has places for {min(room)}"
            )
        own = len(batch) - batch.filler

        def want(model: Any, batch: Batch) -> list[list[Hypothesis]]:
            return generate(model, batch, options, constraint=constraint, prompts=prompts, room=room)

        prompts = self.asked.prompts(batch)
        found: list[list[Hypothesis]] = self.run(batch.to(self.device), want)
        return found[:own]

    def rank(
        self,
        batch: Batch,
        texts: Sequence[Sequence[int]],
        *,
        constraint: Constraint | None = None,
        chunk: int = 20,
        likeliest: int | None = None,
    ) -> Tensor:
        """Return the log-probability of each candidate for a batch's own rows [B, A], on the CPU."""
        prompts = self.asked.prompts(batch)

        def want(model: Any, batch: Batch) -> Tensor:
            how = {"prompts": prompts, "constraint": constraint, "chunk": chunk, "likeliest": likeliest}
            return candidates.rank(model, model.remember(batch), texts, **how)

        with torch.no_grad():
            found_BA: Tensor = self.run(batch.to(self.device), want)
        return found_BA[: len(batch) - batch.filler].cpu()

    def likelihood(self, batch: Batch, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-probability of one text a row with its end, of a batch's own rows [B], on the CPU."""
        prompts = self.asked.prompts(batch)

        def want(model: Any, batch: Batch) -> Tensor:
            memory: Memory = model.remember(batch)
            return candidates.log_likelihood(model, memory, texts, prompts=prompts)

        with torch.no_grad():
            found_B: Tensor = self.run(batch.to(self.device), want)
        return found_B[: len(batch) - batch.filler].cpu()

    def text(self, found: Hypothesis) -> str:
        """Return what was written as text."""
        return self.composer.tokenizer.decode(found.tokens).strip()

    def _texts(self, lines: list[str]) -> Batch:
        rows = [self.composer.row(Example(key=line, images=[], suffix=line), []) for line in lines]
        return self.composer.collate(rows)


class Eval:
    """Base of every eval."""

    needs: ClassVar[tuple[str, ...]] = ()  #: of what the model provides

    def __init__(self, config: Any) -> None:
        self.config = config
        #: what a report shows of the last run, as JSON holds it, under the eval's name; set on rank 0 by evals with any
        self.examples: dict[str, Any] | None = None

    def run(self, features: Features) -> dict[str, Score]:
        """Return scores by name, the same on every rank."""
        raise NotImplementedError

    def batches(self, features: Features, *, asked: bool = False) -> Iterator[Batch]:
        """Yield this rank's part of the data, equally many batches on all ranks; unusable samples are told.

        `asked`: rows show what is given, for a model that writes the rest (data/asked.py).
        """
        bad: list[dict[str, str]] = []
        for batch in self._scan(features, features.asked if asked else features.composer):
            bad += batch.bad
            yield batch
        if bad:
            log.warning(
                "%d samples of %s are unusable and not scored, the first: %s", len(bad), self.config.data, bad[0]
            )

    def _scan(self, features: Features, composer: Composer) -> Iterator[Batch]:
        return loader.scan(
            self.config.data,
            reader=self.config.reader,
            transform=features.transform,
            composer=composer,
            batch_size=self.config.batch_size,
            rank=dist.rank(),
            world=dist.world(),
            decode=self.config.decode,
            access=self.config,
            beside=sources.Beside(instruction=self.config.instruction, regions=self.config.regions),
        )

    def instruction(self) -> Instruction | None:
        """Return the instruction that is laid around samples."""
        return instructions.base.make(self.config.instruction, others=None)

    def written(
        self, features: Features, people: Callable[[dict[str, Any]], list[str]]
    ) -> list[tuple[tuple[str, str], str, list[str]]]:
        """Return (sample, what the model writes, what people wrote) of all samples, on every rank; show the first."""
        rows = []
        for batch in self.batches(features, asked=True):
            texts = [features.text(kept[0]) for kept in features.write(batch, self.config.write)]
            cards = []
            for name, text, meta in zip(names(batch), texts, batch.meta):
                rows.append((name, text, people(meta)))
                cards.append({"given": symbols.plain(meta[GIVEN]), "written": text, "people": rows[-1][2]})
            self.show(batch, cards, count=self.config.examples)
        return everyone(rows)

    def show(self, batch: Batch, cards: list[dict[str, Any]], *, count: int) -> None:
        """Keep the first rows of rank 0 for the report: a card a row, with its picture; there are `count` at most."""
        if not dist.is_main():
            return
        kept = (self.examples or {}).get("written", [])
        rows = min(len(cards), count - len(kept))
        if rows > 0:
            pictures = of_rows(batch, rows, SIDE)
            self.examples = {"written": [*kept, *({**c, "image": p} for c, p in zip(cards, pictures))]}


def everyone(rows: list[Any]) -> list[Any]:
    """Return the rows of all ranks, in the order of their first entries, which name the sample."""
    return sorted((row for part in dist.gather_objects(rows) for row in part), key=lambda row: row[0])


def said(meta: dict[str, Any]) -> str:
    """Return what a sample says itself, as people read it."""
    return symbols.plain(meta[SAID]).strip()


def names(batch: Batch) -> list[tuple[str, str]]:
    """Return (shard, key) of a batch's own rows."""
    own = len(batch) - batch.filler
    return list(zip(batch.shards[:own], batch.keys[:own]))


def refuse_unserved(sections: Mapping[str, Config], provides: tuple[str, ...]) -> None:
    """Raise a ConfigError where an eval needs what the model does not provide."""
    for name in sections:
        missing = set(registry.find("pretrain.evals", name).Eval.needs) - set(provides)
        if missing:
            raise ConfigError(f"evals.{name} needs {sorted(missing)}, the model provides {sorted(provides)}")

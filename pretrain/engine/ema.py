"""An exponential moving average of the weights, kept in parts as ZeRO keeps the masters: no rank ever gathers a whole.

    average <- average + (1 - d) * (weight - average)       d = min(decay ** every, (1 + t) / (10 + t))

after the t-th of every `every`-th update (Polyak & Juditsky 1992; the warm-up is TensorFlow's: without it the first
weights would stay in the average for 1 / (1 - decay) steps). Checkpoints keep it by parameter name beside the moments,
evals and exports use it. Running statistics of batch norms are not averaged: they are averages already.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from pretrain.config import Section

CHUNK = 2**22  #: elements that are exchanged at once


class Config(Section):
    """The `ema:` section."""

    decay: float = Field(0.0, ge=0, lt=1)  #: 0: no average; 0.9999 suits 100,000 steps, 0.999 suits 5,000
    every: int = Field(1, ge=1)  #: updates between two averagings; the decay stays one per update
    warmup: bool = True  #: average over a growing window first


class Average:
    """The average of what this rank holds of the masters."""

    def __init__(self, config: Config, masters: Sequence[Tensor]) -> None:
        """Start from the masters as they are."""
        self.config = config
        self._parts = {id(m): m.detach().clone() for m in masters}

    def part(self, master: Tensor) -> Tensor | None:
        """Return the average of a master, or None where it is none that trains."""
        return self._parts.get(id(master))

    def decay(self, updates: int) -> float:
        """Return d of the averaging after so many updates."""
        decay, t = self.config.decay**self.config.every, updates // self.config.every
        return min(decay, (1 + t) / (10 + t)) if self.config.warmup else decay

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], updates: int) -> None:
        """Take the masters into the average, where it is due after so many updates."""
        if updates % self.config.every == 0:
            parts = [self._parts[id(m)] for m in masters]
            torch._foreach_lerp_(parts, [m.detach() for m in masters], 1 - self.decay(updates))

    @torch.no_grad()
    def exchange(self, masters: Sequence[Tensor]) -> None:
        """Put the average where the masters are, and them where it was; done twice, all is as before to the bit."""
        for master in masters:
            pairs = zip(self._parts[id(master)].view(-1).split(CHUNK), master.detach().view(-1).split(CHUNK))
            for ours, theirs in pairs:
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)

"""What every way of writing shares: options, prompts, and the pen that says what may come next.

Shapes: B = rows of a batch, R = rows that are written (a batch's rows, each as often as it has beams or samples),
U = tokens so far, V = vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Section
from pretrain.models.base import Memory, Writer
from pretrain.models.cache import Cache
from pretrain.models.constraints import Constraint, repeating


class Options(Section):
    """How text is written. Defaults: the likeliest token at each step; those of transformers where it has them."""

    beams: int = Field(default=1, ge=1)  #: beginnings that are kept at each step
    sample: bool = False  #: draw tokens, instead of taking the likeliest
    keep: int = Field(default=1, ge=1)  #: texts a row: the best of the beams, or so many samples
    max_tokens: int = Field(default=20, ge=1)  #: with the end; fewer where the model has no more places
    min_tokens: int = Field(default=0, ge=0)  #: written before the end token may come
    length_penalty: float = 1.0  #: beams: log-probabilities are divided by tokens to this power
    no_repeat: int = Field(default=0, ge=0)  #: no sequence of so many tokens comes twice; 0: any may
    temperature: float = Field(default=1.0, gt=0)  #: sampling: logits are divided by it
    top_k: int | None = Field(default=None, ge=1)  #: sampling: among so many of the likeliest tokens
    top_p: float | None = Field(default=None, gt=0, le=1)  #: sampling: among the likeliest that hold this probability
    seed: int = 0  #: sampling

    @model_validator(mode="after")
    def _fits(self) -> "Options":
        if self.sample and self.beams > 1:
            raise ValueError("sample: tokens are drawn with beams: 1; keep says how many texts are drawn")
        if not self.sample and self.keep > self.beams:
            raise ValueError(f"keep: {self.keep} texts of {self.beams} beams; raise beams, or set sample: true")
        if not self.sample and (self.temperature != 1 or self.top_k is not None or self.top_p is not None):
            raise ValueError("temperature, top_k and top_p are for sampling; set sample: true")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens} is above max_tokens, {self.max_tokens}")
        return self


def refuse_rules(options: Options) -> None:
    """Raise a ValueError where options forbid tokens of a text whose tokens a constraint chooses."""
    if options.no_repeat or options.min_tokens:
        raise ValueError("write: no_repeat and min_tokens are for free text, here a list or a range says what may come")


class Hypothesis(NamedTuple):
    """A text as tokens: without what was given (the decoder's first tokens, the prompt) and without its end token."""

    tokens: list[int]
    score: float  #: log-probability, the end token's included; of a beam divided by the length penalty


def until(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the first end."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


class Pen:
    """Rows that are being written: what they say so far, and the log-probabilities of what may come next.

    A row's prompt is read by the decoder before it writes; rows with longer prompts go on reading while others already
    write, so that no row is padded and positions are those of a row alone.
    """

    def __init__(
        self,
        model: Writer,
        memory: Memory,
        options: Options,
        *,
        constraint: Constraint | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        room: Sequence[int] | None = None,
        copies: int = 1,
        cached: bool = True,
    ) -> None:
        assert constraint is None or not (options.no_repeat or options.min_tokens), "a constraint says what may come"
        rows, device = len(memory.states_BSC), memory.states_BSC.device
        given = [[*model.first, *prompt] for prompt in (prompts or [[]] * rows)]
        assert len(given) == rows, "a prompt for each row"
        self.model, self.options, self.constraint = model, options, constraint
        self.device, self.end = device, model.end
        self.memory = memory.rows(torch.arange(rows, device=device).repeat_interleave(copies)) if copies > 1 else memory
        self.given_R = torch.tensor([len(one) for one in given], device=device).repeat_interleave(copies)
        longest = max(len(one) for one in given)
        padded = torch.tensor([[*one, *[model.end] * (longest - len(one))] for one in given], device=device)
        self._given_RP = padded.repeat_interleave(copies, 0)
        self.tokens_RU = self._given_RP[:, : min(len(one) for one in given)]
        self.longest = options.max_tokens if constraint is None else constraint.longest
        self.most_R = torch.full_like(self.given_R, self.longest)
        free_R = model.room(self.memory)
        if room is not None:
            free_R = torch.tensor(room, device=device).repeat_interleave(copies)
        if free_R is not None:
            self.most_R = torch.minimum(self.most_R, free_R)
        model.refuse_longer(self.memory, self.most_R)
        self._state_R = None if constraint is None else constraint.start(rows * copies, device)
        self._cache = Cache() if cached else None
        self._seen = 0

    @property
    def written_R(self) -> Tensor:
        """Return the number of tokens that each row has written; negative while it reads its prompt."""
        return self.tokens_RU.shape[1] - self.given_R

    @property
    def limit(self) -> int:
        """Return the most tokens that a row of these can have, what is given included."""
        return int((self.given_R + self.most_R).max())

    def log_probs(self) -> Tensor:
        """Return log-probabilities of the next token [R, V], float32, -inf where it may not come.

        Under a constraint they are those of a softmax over what it allows. What `no_repeat` and `min_tokens` forbid
        keeps its share of the probability, as in transformers. A prompt's token has log-probability 0.
        """
        logits_RV = self._next().float()
        if self.constraint is not None and self._state_R is not None:
            allowed_RV = self.constraint.allowed(self._state_R, logits_RV.shape[1])
            logits_RV = logits_RV.masked_fill(~allowed_RV, -torch.inf)
        out_RV = logits_RV.log_softmax(1)
        if self.options.no_repeat:
            out_RV = out_RV.masked_fill(repeating(self.tokens_RU, self.options.no_repeat, out_RV.shape[1]), -torch.inf)
        if self.options.min_tokens:
            early_R = self.written_R < self.options.min_tokens
            out_RV[:, self.end] = out_RV[:, self.end].masked_fill(early_R, -torch.inf)
        length = self.tokens_RU.shape[1]
        if length < self._given_RP.shape[1]:
            only_RV = torch.full_like(out_RV, -torch.inf).scatter_(1, self._given_RP[:, length, None], 0.0)
            out_RV = torch.where((self.written_R < 0)[:, None], only_RV, out_RV)
        return out_RV

    def append(self, token_R: Tensor) -> None:
        """Write a token in each row."""
        if self.constraint is not None and self._state_R is not None:
            after_R = self.constraint.advance(self._state_R, token_R)
            self._state_R = torch.where(self.written_R < 0, self._state_R, after_R)
        self.tokens_RU = torch.cat([self.tokens_RU, token_R[:, None]], 1)

    def select(self, index_R: Tensor) -> None:
        """Go on with these rows, each from the same row of the batch as the one in whose place it comes."""
        self.tokens_RU = self.tokens_RU[index_R]
        if self._state_R is not None:
            self._state_R = self._state_R[index_R]
        if self._cache is not None:
            self._cache.reorder(index_R)

    def idle(self) -> None:
        """Call the model as other ranks do, which are not done yet, and forget what it said."""
        if self._cache is None:
            self.model.write(self.tokens_RU[:, :-1], self.memory, None)
        elif self._cache.length > 1:  # the last token that was read once more: behind it there may be no place
            self._cache.drop(1)
            self.model.write(self.tokens_RU[:, -2:-1], self.memory, self._cache)
        else:
            self.model.write(self.tokens_RU[:, -1:], self.memory, self._cache)
            self._cache.drop(1)

    def _next(self) -> Tensor:
        if self._cache is None:
            return self.model.write(self.tokens_RU, self.memory, None)[:, -1]
        new_RU, self._seen = self.tokens_RU[:, self._seen :], self.tokens_RU.shape[1]
        return self.model.write(new_RU, self.memory, self._cache)[:, -1]

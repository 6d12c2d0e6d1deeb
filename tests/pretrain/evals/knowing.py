"""A writer that knows what it should say, and tiny real ones, over the made-up shapes: for evals of text."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.data import tokenizer
from pretrain.data.seq2seq import Seq2SeqComposer
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.transforms import Transform
from pretrain.evals.base import Features
from pretrain.models import base
from pretrain.models.base import Memory
from pretrain.models.cache import Cache
from tests import tiny

SYMBOLS = tuple(f"<bin_{n}>" for n in range(33))


class Knowing(base.Writer):
    """Says the text that `says` returns of a row's meta, and then its end, with probability 1 - `doubt` a token."""

    provides = ("seq2seq", "generate")

    def __init__(self, words: Tokenizer, says: Any, *, doubt: float = 0.0) -> None:
        super().__init__()
        self.words, self.says, self.doubt = words, says, doubt
        self.first, self.end = (words.start,), words.end

    def remember(self, batch: Batch) -> Memory:
        texts = [[*self.words.ids(self.says(meta)), self.end] for meta in batch.meta]
        longest = max(map(len, texts))
        said_BL = torch.tensor([[*text, *[self.end] * (longest - len(text))] for text in texts])
        states = torch.zeros(len(batch), 1, 1)
        return Memory(states, torch.ones(len(batch), 1, dtype=torch.bool), {"said": said_BL})

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        key = tokens_BU[:, None, :, None].double()
        first = 0 if cache is None else cache.length
        if cache is not None:
            cache.grow("0", key, key)
        said_BL = memory.beside["said"]
        place_U = (first + torch.arange(tokens_BU.shape[1])).clamp(max=said_BL.shape[1] - 1)
        other = self.doubt / (self.words.vocab_size - 1)
        odds = torch.full((*tokens_BU.shape, self.words.vocab_size), other)
        odds.scatter_(2, said_BL[:, place_U][..., None], 1 - self.doubt)
        return odds.clamp(min=1e-12).log()


def features(
    folder: Path, says: Any, *, doubt: float = 0.0, written: int = 40, symbols: tuple[str, ...] = SYMBOLS
) -> Features:
    """Return a model that knows, and its way of reading the corpus of `folder`."""
    words = tokenizer.load(tiny.corpus(folder) / "tokenizer").extended(symbols)
    model = Knowing(words, says, doubt=doubt)

    def run(batch: Batch, want: Any) -> Any:
        return want(model, batch)

    composer = Seq2SeqComposer(words, context_length=64, written=written, opening=model.first)
    return Features(run=run, transform=Transform(32), composer=composer)

"""Perplexity: how surprised a model that writes is by what samples say, given the rest of them.

The number of a text is that of its tokens and its end; texts that are longer than the model's places are cut there.
"""

from typing import Any

from pretrain.data import symbols
from pretrain.data.asked import SAID
from pretrain.evals import base
from pretrain.metrics import perplexity
from pretrain.metrics.interval import Score


class Config(base.Config):
    """`evals.perplexity`."""


class Eval(base.Eval):
    """Perplexity over all texts."""

    config: Config
    needs = ("generate",)

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return perplexity and bits_per_byte; the latter compares models with different tokenizers."""
        words = features.composer.tokenizer
        rows: list[tuple[Any, float, int, int]] = []
        for batch in self.batches(features, asked=True):
            room = features.asked.room(batch)
            whole = [words.ids(meta[SAID]) for meta in batch.meta]
            texts = [ids[: most - 1] for ids, most in zip(whole, room)]
            likely = features.likelihood(batch, texts).tolist()
            for name, found, text, ids, meta in zip(base.names(batch), likely, texts, whole, batch.meta):
                # the bytes that are scored
                said = symbols.plain(meta[SAID]) if len(text) == len(ids) else words.decode(text)
                rows.append((name, -found, len(text) + 1, max(1, len(said.encode()))))
        rows = base.everyone(rows)
        surprise = [row[1] for row in rows]
        return {
            "perplexity": perplexity.perplexity(surprise, [row[2] for row in rows]),
            "bits_per_byte": perplexity.bits_per_byte(surprise, [row[3] for row in rows]),
        }

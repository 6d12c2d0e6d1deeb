"""Translations: corpus BLEU of sacrebleu (Post 2018, arXiv:1804.08771), with an interval over sentences."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from pretrain.config import ConfigError
from pretrain.metrics.interval import Score, resampled


def bleu(written: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False) -> Score:
    """Return BLEU in [0, 1] of one text a sentence; every sentence has equally many references.

    Args:
        written: the translations.
        references: of each sentence.
        lowercase: as the recipe of Multi30K has it; sacrebleu's own tokenizer, 13a, in both cases.

    Raises:
        ConfigError: sacrebleu is missing.
    """
    refuse_without_sacrebleu()
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=lowercase, effective_order=True)  # for the counts of a sentence; the order is set below
    rows = []
    for text, several in zip(written, references, strict=True):
        found = metric.sentence_score(text, list(several))
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def score(sums_S: np.ndarray) -> float:
        right, made, (length, reference) = sums_S[:4], sums_S[4:8], sums_S[8:]
        counts = (right.tolist(), made.tolist(), int(length), int(reference))
        return BLEU.compute_bleu(*counts, smooth_method="exp").score / 100  # as corpus_bleu by default

    return resampled(rows, score, unit="points")


def refuse_without_sacrebleu() -> None:
    """Raise a ConfigError where sacrebleu is missing."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError("BLEU of translations needs sacrebleu: pip install diptych[tools]")

"""Captions against references: CIDEr-D, BLEU-1 to 4 and ROUGE-L, as pycocoevalcap 1.2 computes them, without Java.

Vedantam et al. 2015 (CIDEr-D, arXiv:1411.5726), Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE). Texts are lists of
words (metrics/words.py); which words is part of a score's name, since numbers of papers need PTB's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pretrain.metrics.interval import Score, mean, resampled

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]
ORDERS = 4
SIGMA = 6.0  # CIDEr-D: of the penalty on lengths
BETA = 1.2  # ROUGE-L: how much more recall counts


def scores(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, Score]:
    """Return CIDEr-D, BLEU-1 to 4 and ROUGE-L of one text a picture, with intervals over pictures.

    Document frequencies stay those of all references in each resample.
    """
    known = Documents(references)
    cider = [known.cider_d(text, several) for text, several in zip(written, references, strict=True)]
    found = {"CIDEr-D": mean(cider, unit="points")}
    counts = [matches(text, several) for text, several in zip(written, references)]
    found |= {
        f"BLEU-{order}": resampled(counts, lambda sums, order=order: bleu(sums, order), unit="points")
        for order in range(1, ORDERS + 1)
    }
    return found | {"ROUGE-L": mean([rouge_l(text, several) for text, several in zip(written, references)],
                                    unit="points")}  # fmt: skip


def grams(words: Words) -> Grams:
    """Return how often each sequence of 1 to 4 words occurs."""
    return Counter(tuple(words[n : n + k]) for k in range(1, ORDERS + 1) for n in range(len(words) - k + 1))


class _Vector(NamedTuple):
    weight: dict[tuple[str, ...], float]  #: count times inverse document frequency
    norm: list[float]  #: by order
    bigrams: int


class Documents:
    """How many pictures' references hold each sequence of words: the inverse document frequency of CIDEr-D.

    What rewards a model for its captions (self-critical training) takes that of the whole corpus, not of a batch.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self.pictures = len(references)
        self.count: Grams = Counter()
        for several in references:
            self.count.update({gram for text in several for gram in grams(text)})

    def cider_d(self, text: Words, references: Sequence[Words]) -> float:
        """Return CIDEr-D of a text, from 0 to 10: 0 where there is one picture only, as nothing is rare then."""
        mine = self._vector(text)
        return 10 * sum(self._likeness(mine, self._vector(other)) for other in references) / len(references)

    def _vector(self, words: Words) -> _Vector:
        counts = grams(words)
        log_pictures = math.log(self.pictures)
        weight = {gram: n * (log_pictures - math.log(max(1, self.count[gram]))) for gram, n in counts.items()}
        square = [0.0] * ORDERS
        for gram, value in weight.items():
            square[len(gram) - 1] += value * value
        return _Vector(weight, [math.sqrt(x) for x in square], max(0, len(words) - 1))

    @staticmethod
    def _likeness(mine: _Vector, other: _Vector) -> float:
        """Return the mean over orders of clipped cosines, under the penalty on lengths, which count in bigrams."""
        common = [0.0] * ORDERS
        for gram, value in mine.weight.items():
            if gram in other.weight:
                common[len(gram) - 1] += min(value, other.weight[gram]) * other.weight[gram]
        sizes = [a * b for a, b in zip(mine.norm, other.norm)]
        penalty = math.exp(-((mine.bigrams - other.bigrams) ** 2) / (2 * SIGMA**2))
        return penalty * sum(c / s for c, s in zip(common, sizes) if s) / ORDERS


def matches(text: Words, references: Sequence[Words]) -> list[float]:
    """Return what corpus BLEU sums: for each order matches and words, then both lengths (the closest reference's)."""
    most: Grams = Counter()
    for other in references:
        most |= grams(other)
    right = [0] * ORDERS
    for gram, n in grams(text).items():
        right[len(gram) - 1] += min(n, most[gram])
    length = len(text)
    closest = min((abs(len(other) - length), len(other)) for other in references)[1]
    made = [max(0, length - order) for order in range(ORDERS)]
    return [*right, *made, length, closest]


def bleu(sums_S: np.ndarray, order: int = ORDERS) -> float:
    """Return corpus BLEU up to an order from summed `matches`; without any match of an order it is practically 0."""
    right, made, (length, closest) = sums_S[:ORDERS], sums_S[ORDERS : 2 * ORDERS], sums_S[-2:]
    logs = [math.log((right[n] + 1e-15) / (made[n] + 1e-9)) for n in range(order)]
    ratio = (length + 1e-15) / (closest + 1e-9)
    return math.exp(sum(logs) / order + min(0.0, 1 - 1 / ratio))


def rouge_l(text: Words, references: Sequence[Words]) -> float:
    """Return the F-score of the longest common subsequence; precision and recall are each the best reference's."""
    common = [_common(text, other) for other in references]
    precision = max(n / max(1, len(text)) for n in common)
    recall = max(n / max(1, len(other)) for n, other in zip(common, references))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision and recall else 0.0


def _common(left: Words, right: Words) -> int:
    """Return the length of the longest common subsequence."""
    best = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for place, other in enumerate(right, 1):
            before, best[place] = best[place], before + 1 if one == other else max(best[place], best[place - 1])
    return best[-1]

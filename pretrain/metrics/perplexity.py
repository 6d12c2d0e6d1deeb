"""Perplexity: how many words a model hesitates between, exp of the mean surprise of a token.

Numbers of models with different tokenizers do not compare; bits a byte do.
"""

import math
from collections.abc import Sequence

from pretrain.metrics.interval import Score, resampled


def perplexity(surprise_N: Sequence[float], tokens_N: Sequence[int]) -> Score:
    """Return exp(sum of negative log-probabilities / tokens), each text's in nats; the interval is over texts."""
    return resampled(list(zip(surprise_N, tokens_N)), lambda sums: math.exp(min(700.0, sums[0] / sums[1])), unit="")


def bits_per_byte(surprise_N: Sequence[float], bytes_N: Sequence[int]) -> Score:
    """Return the sum of negative log-probabilities in bits, divided by the bytes of the texts in UTF-8."""
    rows = list(zip(surprise_N, bytes_N))
    return resampled(rows, lambda sums: sums[0] / sums[1] / math.log(2), unit="")

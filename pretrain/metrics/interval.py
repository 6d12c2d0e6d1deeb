"""A score and its 95 % interval: no number is reported without saying how sure it is.

Shapes: N = samples, S = what is summed of each sample, R = resamples.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Score(NamedTuple):
    """A number, its 95 % interval and the number of trials."""

    value: float
    low: float
    high: float
    count: int
    #: "%": a share, in [0, 1]; "points": shown times 100, as tables of captions have it; "": shown as it is
    unit: str = "%"

    def __str__(self) -> str:
        value, low, high = (shown(x, self.unit) for x in (self.value, self.low, self.high))
        return f"{value}{sign(self.unit)} [{low}, {high}]"


def shown(value: float, unit: str) -> str:
    """Return a number as people read it, without its sign."""
    return f"{value:.2f}" if unit == "" else f"{100 * value:.1f}"


def sign(unit: str) -> str:
    """Return what stands behind a number of this unit."""
    return " %" if unit == "%" else ""


def proportion(hits: float, count: int) -> Score:
    """Return hits / count with the Wilson score interval (Wilson 1927), which stays inside [0, 1].

    A hit may be a fraction: of all numbers in [0, 1] with this mean, zeros and ones vary most, so the interval is too
    wide rather than too narrow.

    Raises:
        ValueError: nothing was counted.
    """
    if count == 0:
        raise ValueError("a score over zero samples means nothing; check the eval's data")
    z = 1.959964
    p, n = hits / count, count
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Score(p, max(0.0, middle - half), min(1.0, middle + half), count)


def resampled(rows_NS: Sequence[Sequence[float]], score: Callable[[np.ndarray], float], *, unit: str) -> Score:
    """Return the score of the sums of all samples, with the interval of 1000 resamples (Efron 1979, percentiles).

    Args:
        rows_NS: what is summed of each sample, e.g. matches and lengths; equal rows in equal order give equal bounds.
        score: takes the sums [S].
        unit: of the score.

    Raises:
        ValueError: nothing was counted.
    """
    if not len(rows_NS):
        raise ValueError("a score over zero samples means nothing; check the eval's data")
    table_NS = np.asarray(rows_NS, dtype=np.float64)
    source = np.random.Generator(np.random.PCG64(0))
    count = len(table_NS)
    values_R = []
    for _ in range(RESAMPLES):
        times_N = np.bincount(source.integers(0, count, count), minlength=count)
        values_R.append(score(times_N @ table_NS))
    low, high = np.percentile(values_R, [2.5, 97.5])
    return Score(float(score(table_NS.sum(0))), float(low), float(high), count, unit)


def mean(values_N: Sequence[float], *, unit: str) -> Score:
    """Return the mean of one number a sample, with the interval of resamples."""
    return resampled([[value, 1.0] for value in values_N], lambda sums: sums[0] / sums[1], unit=unit)

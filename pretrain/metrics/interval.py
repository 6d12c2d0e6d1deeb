"""A score and its 95 % interval: no number is reported without saying how sure it is."""

import math
from typing import NamedTuple


class Score(NamedTuple):
    """A proportion in [0, 1], its 95 % interval and the number of trials."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def proportion(hits: int, count: int) -> Score:
    """Return hits / count with the Wilson score interval (Wilson 1927), which stays inside [0, 1].

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

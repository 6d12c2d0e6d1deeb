"""Boxes as four tokens: coordinates in bins, as OFA writes them (Wang et al. 2022, arXiv:2202.03052).

A coordinate of x pixels is bin round(x / divisor * (bins - 1)). OFA divides by 512 whatever the side of its pictures;
the side itself spreads the bins over the whole picture. Whoever reads bins must divide as they were written.

Letters: K = boxes; the four numbers are x0 y0 x1 y1, in [0, 1] of the picture.
"""

import numpy as np
from numpy.typing import NDArray

from pretrain.config import Section
from pretrain.data.symbols import symbol


class Config(Section):
    """How coordinates are cut into bins."""

    bins: int = 1000
    divisor: int | None = 512  #: pixels that the last bin stands for; none: the side of the picture


def encode(boxes_K4: NDArray[np.float32], side: int, config: Config) -> NDArray[np.int64]:
    """Return the bins [K, 4] of boxes in a picture of `side` x `side` pixels."""
    last = config.bins - 1
    found_K4 = np.rint(boxes_K4.astype(np.float64) * side / (config.divisor or side) * last)
    return found_K4.clip(0, last).astype(np.int64)


def decode(bins_K4: NDArray[np.int64], side: int, config: Config) -> NDArray[np.float32]:
    """Return the boxes [K, 4] that bins stand for, cut at the border of the picture."""
    boxes_K4 = np.asarray(bins_K4, dtype=np.float64) / (config.bins - 1) * (config.divisor or side) / side
    return boxes_K4.clip(0, 1).astype(np.float32)


def text(boxes_K4: NDArray[np.float32], side: int, config: Config) -> list[str]:
    """Return each box as the four symbols that a text lays."""
    return [" ".join(symbol(f"<bin_{n}>") for n in row) for row in encode(boxes_K4, side, config).tolist()]

"""The matrix of all pairs in tiles that fit a cache: it is computed when needed, again if need be, and never kept.

Shapes: B = rows, M = columns, E = embedding width, t u = rows and columns of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

#: rows and columns of a tile. A CPU wants a tile and its operands in its cache, a GPU few and large multiplications
SIDES = {"cpu": 512, "cuda": 4096}


def side(device: torch.device) -> int:
    """Return how many rows and columns a tile has on a device."""
    return SIDES.get(device.type, SIDES["cuda"])


def spans(count: int, size: int) -> list[slice]:
    """Return `count` places cut into slices of `size`; the last may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def full(x_BE: Tensor) -> Tensor:
    """Return features in at least single precision: sums over all pairs are not for half precision."""
    return x_BE.float() if x_BE.element_size() < 4 else x_BE


class Tiles:
    """Tiles x y^T of one row span of `like` after another, in one buffer that each next tile overwrites."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.size = size
        self._buffer = like.new_empty(min(size, len(like)) * size)
        self._second: Tensor | None = None

    def scratch(self, tile_tu: Tensor) -> Tensor:
        """Return a second buffer [t, u] of a tile's shape; there is one."""
        if self._second is None:
            self._second = torch.empty_like(self._buffer)
        return self._second[: tile_tu.numel()].view_as(tile_tu)

    def along(self, x_tE: Tensor, y_ME: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, x y^T [t, u]) for all columns."""
        for columns in spans(len(y_ME), self.size):
            y_uE = y_ME[columns]
            out_tu = self._buffer[: len(x_tE) * len(y_uE)].view(len(x_tE), len(y_uE))
            yield columns, torch.mm(x_tE, y_uE.T, out=out_tu)

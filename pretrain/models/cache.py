"""Keys and values of what a decoder has read and written, so that each new token costs one step.

Shapes: B = rows, H = heads, T = tokens, D = width of a head.
"""

import torch
from torch import Tensor


class Cache:
    """Keys and values by layer: `grow` for what is written, `once` for what is read and never changes."""

    def __init__(self) -> None:
        self._grown: dict[str, tuple[Tensor, Tensor]] = {}
        self._fixed: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Return the number of tokens written so far."""
        return next((key.shape[2] for key, _ in self._grown.values()), 0)

    def grow(self, layer: str, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens of a layer and return all of its keys and values."""
        if layer in self._grown:
            old_key, old_value = self._grown[layer]
            key_BHTD, value_BHTD = torch.cat([old_key, key_BHTD], 2), torch.cat([old_value, value_BHTD], 2)
        self._grown[layer] = (key_BHTD, value_BHTD)
        return self._grown[layer]

    def once(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Return what was `kept` for a layer."""
        return self._fixed.get(layer)

    def keep(self, layer: str, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a layer's memory."""
        self._fixed[layer] = (key_BHTD, value_BHTD)
        return self._fixed[layer]

    def select(self, index_B: Tensor) -> None:
        """Keep these rows, in this order; a row may come often, as in a beam."""
        for store in (self._grown, self._fixed):
            for layer, (key, value) in store.items():
                store[layer] = (key[index_B], value[index_B])

    def reorder(self, index_B: Tensor) -> None:
        """Keep these rows of what is written; each reads the same memory as the row in whose place it comes."""
        for layer, (key, value) in self._grown.items():
            self._grown[layer] = (key[index_B], value[index_B])

    def drop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens: an appended [MASK] must not stay where the next word comes."""
        for layer, (key, value) in self._grown.items():
            self._grown[layer] = (key[:, :, : key.shape[2] - tokens], value[:, :, : value.shape[2] - tokens])

"""Low-rank updates of a linear, also of single parts of a fused one (LoRA, Hu et al. 2021, arXiv:2106.09685).

    y = W x + (alpha / rank) B A dropout(x);   A drawn as torch draws linears, B zero: nothing changes at first

Of a linear that gives q, k and v at once, each part that takes part has an A and a B of its own, as unfused ones would.
Shapes: G = parts that are updated, R = rank, I = input width, O = width of a part.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRank(nn.Module):
    """A linear and its update; the linear itself is left alone."""

    def __init__(
        self,
        inner: nn.Linear,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        parts: int = 1,
        chosen: tuple[int, ...] = (0,),
    ) -> None:
        """Update the parts `chosen` (in rising order) of the `parts` equal ones that the linear's output has."""
        super().__init__()
        assert isinstance(inner, nn.Linear) and inner.out_features % parts == 0, "a linear that divides into its parts"
        self.inner, self.parts, self.chosen, self.scale = inner, parts, chosen, alpha / rank
        self.dropout = nn.Dropout(dropout)
        width = inner.out_features // parts
        self.lora_a = nn.Parameter(inner.weight.new_empty(len(chosen), rank, inner.in_features))
        self.lora_b = nn.Parameter(inner.weight.new_zeros(len(chosen), width, rank))
        for a_RI in self.lora_a.data:
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the linear gives, updated."""
        low = F.linear(self.dropout(x), self.lora_a.flatten(0, 1)).unflatten(-1, (len(self.chosen), -1))
        updates = [F.linear(low[..., g, :], self.lora_b[g]) for g in range(len(self.chosen))]
        return self.inner(x) + self.scale * self._placed(updates)

    def _placed(self, updates: list[Tensor]) -> Tensor:
        """Return the parts side by side, zeros where there is no update."""
        by_part = dict(zip(self.chosen, updates))
        return torch.cat([by_part.get(p, torch.zeros_like(updates[0])) for p in range(self.parts)], dim=-1)

    def merged(self) -> nn.Linear:
        """Return the linear with the update added to its weight."""
        with torch.no_grad():
            weight_PO = self.inner.weight.view(self.parts, -1, self.inner.in_features)
            for g, part in enumerate(self.chosen):
                weight_PO[part] += self.scale * self.lora_b[g] @ self.lora_a[g]
        return self.inner

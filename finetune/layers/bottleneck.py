"""The bottleneck of adapters: down, a nonlinearity, up (Houlsby et al. 2019, arXiv:1902.00751).

Shapes: N = rows, E = width, D = inner width.
"""

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Two linears with a narrow middle; the residual around it, and its ratio, are the method's."""

    def __init__(self, width: int, inner: int, *, bias: bool = True, activation: nn.Module, last: nn.Module) -> None:
        """Go through `inner` features; `last` is applied to what comes up (`nn.Identity()`: nothing)."""
        super().__init__()
        self.down = nn.Linear(width, inner, bias=bias)
        self.activation = activation
        self.up = nn.Linear(inner, width, bias=bias)
        self.last = last

    def forward(self, x_NE: Tensor) -> Tensor:
        """Return [N, E]."""
        return self.last(self.up(self.activation(self.down(x_NE))))

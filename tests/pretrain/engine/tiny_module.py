"""A tiny module for engine tests: odd sizes, two groups, a [1] scalar, a frozen and a tied parameter, a buffer."""

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.models.depth import Depth

WIDTH = 7


class Tiny(nn.Module):
    """Regression on rows that are a function of their key."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(WIDTH, 11)
        self.norm = nn.LayerNorm(11)
        self.frozen = nn.Linear(11, 11, bias=False).requires_grad_(False)
        self.last = nn.Linear(11, 3)
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("seen", torch.zeros(1))

    def features(self, x_BF: Tensor) -> Tensor:
        """Return what the loss compares; a method other than forward, for evals."""
        return self.last(self.frozen(torch.tanh(self.norm(self.first(x_BF))))) * self.scale

    def forward(self, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error and a dict of scalars."""
        x_BF = torch.cat([b.image_NCHW for b in batches]).flatten(1)
        if self.training:
            self.seen += 1
        out_BF = self.features(x_BF)
        target_BF = torch.stack([x_BF.sum(1), x_BF[:, 0] * 2, x_BF.prod(1)], 1)
        loss = (out_BF.float() - target_BF).square().mean()
        return loss, {"loss": loss.detach(), "scale": self.scale.detach()}


class Towers(Tiny):
    """Tiny with something to say about depth."""

    def depths(self) -> dict[str, Depth]:
        """Return where the parameters of its only tower lie."""
        layers = {"first": 0, "norm": 1, "last": 2}
        return {f"{name}.{kind}": Depth("trunk", i, 2) for name, i in layers.items() for kind in ("weight", "bias")}


def batch(step: int, rank: int, world: int, size: int = 8) -> Batch:
    """Return this rank's rows of global batch `step`."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 1, 1, WIDTH, generator=generator).chunk(world)[rank]
    return Batch(keys=[f"{step}-{rank}-{i}" for i in range(len(x))], image_NCHW=x)

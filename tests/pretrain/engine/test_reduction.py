"""Gradients that are averaged while backward runs are those of DeepSpeed's own stage 0, whatever becomes ready when."""

import pytest
import torch
from torch import nn

from pretrain import dist
from pretrain.engine import optim, zero
from pretrain.engine.reduction import LARGE, Reduction

SIDE = 256
assert SIDE * SIDE >= LARGE


class Tower(nn.Module):
    """Two large weights that may be used in either order, a small one, one in another layout, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(SIDE, SIDE) / 16)
        self.second = nn.Parameter(torch.randn(SIDE, SIDE) / 16)
        self.bias = nn.Parameter(torch.randn(SIDE))
        self.conv = nn.Parameter(torch.randn(64, 16, 8, 8).contiguous(memory_format=torch.channels_last))
        self.idle = nn.Parameter(torch.randn(SIDE, SIDE))

    def forward(self, x_BC: torch.Tensor, swapped: bool = False) -> torch.Tensor:
        one, two = (self.second, self.first) if swapped else (self.first, self.second)
        image = x_BC.view(len(x_BC), 16, 4, 4)
        grid = torch.conv2d(torch.cat([torch.cat([image] * 2, 2)] * 2, 3), self.conv)
        return ((x_BC @ one + self.bias).tanh() @ two).square().mean() + grid.square().mean()


def rows(step: int) -> torch.Tensor:
    return torch.randn(4, SIDE, generator=torch.Generator().manual_seed(10 * step + dist.rank()))


def averaged(swap: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, for two steps of two backwards each, each gradient and the mean of what the ranks have computed."""
    tower, plain = Tower(), Tower()
    reduction = Reduction([p for p in tower.parameters()])
    found = []
    for step in range(2):
        swapped = swap and dist.rank() == 1
        for part in range(2):
            if part:
                reduction.begin()
            for module in (tower, plain):
                module(rows(2 * step + part), swapped).backward()
            # in the first step the weight that is not used is the first in the order, and holds up all others
            early = step == 1 and part == 1 and dist.world() > 1
            assert bool(reduction._sent) == early, "sent while backward runs"
        reduction.finish()
        for p, own in zip(tower.parameters(), plain.parameters()):
            want = dist.mean(own.grad) if own.grad is not None else torch.zeros_like(own)
            found.append((p.grad.clone(), want))
            p.grad = own.grad = None
    reduction.close()
    return found


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_mean_over_ranks_in_whatever_order_they_become_ready(world, swap, ranks):
    for found in ranks.run(world, averaged, swap):
        assert len(found) == 10
        for got, want in found:
            torch.testing.assert_close(got, want, rtol=0 if world < 3 else 1e-6, atol=0 if world < 3 else 1e-7)


def trained(own: bool) -> list[torch.Tensor]:
    """Return the weights after three steps of stage 0, and without `own` as DeepSpeed averages by itself."""
    config, tower = optim.Config(lr=1e-2), Tower()
    tower.conv = nn.Parameter(tower.conv.data.contiguous())  # DeepSpeed cannot send the other layout
    engine = zero.Engine(
        tower, zero.Config(stage=0), optim_config=config, precision="fp32", rows=4, device=torch.device("cpu")
    )
    if not own:
        engine.reduction.close()
        engine.reduction, engine._deepspeed.enable_backward_allreduce = None, True
    for step in range(3):
        engine.backward(engine(rows(step)))
        engine.step(1e-2)
    weights = [p.detach().clone() for p in engine.module.parameters()]
    engine.close()
    return weights


def test_weights_are_those_of_deepspeeds_own_stage_0(ranks):
    for own, theirs in zip(ranks.run(2, trained, True), ranks.run(2, trained, False)):
        assert all(torch.equal(a, b) for a, b in zip(own, theirs))

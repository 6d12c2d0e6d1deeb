"""Collectives on real gloo ranks, and hashes that are the same on every machine."""

import pytest
import torch

from pretrain import dist


def gathered() -> tuple[torch.Tensor, torch.Tensor]:
    x_BE = (torch.arange(4.0).view(2, 2) + 10 * dist.rank()).requires_grad_()
    all_ME = dist.gather_with_grad(x_BE)
    ((dist.rank() + 1) * all_ME**2).sum().backward()  # every rank wants something else of every row
    assert x_BE.grad is not None
    return all_ME.detach(), x_BE.grad / x_BE.detach()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gather_sends_gradients_home(ranks, world: int) -> None:
    for rank, (rows, ratio) in enumerate(ranks.run(world, gathered)):
        assert rows[2 * rank, 1].item() == 1 + 10 * rank
        assert len(rows) == 2 * world
        wanted = torch.full((2, 2), 2.0 * sum(range(1, world + 1)))
        torch.testing.assert_close(ratio[1], wanted[1])  # row 0 of rank 0 holds a zero


def agreement() -> tuple[bool, bool, float, float, list[int], int]:
    rank = dist.rank()
    return (
        dist.any_rank(rank == dist.world() - 1),
        dist.any_rank(False),
        dist.mean(torch.tensor([float(rank)])).item(),
        dist.total(torch.tensor([float(rank)])).item(),
        dist.gather_objects(rank),
        dist.broadcast_object(rank + 5),
    )


def test_agreement(ranks) -> None:
    assert ranks.run(2, agreement) == [(True, False, 0.5, 1.0, [0, 1], 5)] * 2
    assert agreement() == (True, False, 0.0, 0.0, [0], 5)


def test_hash_is_the_same_everywhere() -> None:
    assert dist.hash64(0, 1, "train-00000.tar", "key") == 39316429128411066
    assert dist.hash64(1, 0) != dist.hash64(0, 1) != dist.hash64("01")
    assert all(0 <= dist.hash64(i) < 2**63 for i in range(1000))

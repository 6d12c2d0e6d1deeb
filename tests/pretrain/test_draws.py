"""Draws from a sample's hash: fixed for good, even, and different for each purpose and place."""

import torch

from pretrain import draws


def test_golden_scores() -> None:
    assert draws.scores(torch.tensor([0]), 2).tolist() == [[-2152535657050944081, 7960286522194355700]]


def test_uniform_numbers() -> None:
    draw_B = torch.arange(4000) * 12345
    one, other = draws.uniform(draw_B, 8, "one"), draws.uniform(draw_B, 8, "other")
    assert one.min() >= 0 and one.max() < 1
    assert torch.allclose(one.mean(0), torch.tensor(0.5).double(), atol=0.02)
    assert torch.allclose(one.var(0), torch.tensor(1 / 12).double(), atol=0.005)
    both = torch.cat([one, other], 1)
    assert (torch.corrcoef(both.T) - torch.eye(16)).abs().max() < 0.06
    assert torch.equal(draws.uniform(draw_B[7:9], 8, "one"), one[7:9])

"""R-Drop's distance of two passes: torch's own KL both ways, nothing where passes agree, and only what is allowed."""

import torch
from torch.nn import functional as F

from pretrain.losses.rdrop import symmetric_kl
from pretrain.losses.tokens import IGNORE

B, T, V = 3, 4, 7


def passes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    one_BTV, other_BTV = torch.randn(2, B, T, V, generator=draw, dtype=torch.float64)
    labels_BT = torch.randint(0, V, (B, T), generator=draw)
    labels_BT[1, 2:] = IGNORE
    return one_BTV, other_BTV, labels_BT


def kl(p_V: torch.Tensor, q_V: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q_V.log_softmax(0), p_V.log_softmax(0), log_target=True, reduction="sum")


def test_it_is_the_mean_of_both_divergences() -> None:
    one_BTV, other_BTV, labels_BT = passes()
    found_BT = symmetric_kl(one_BTV, other_BTV, labels_BT)
    for row, place in torch.cartesian_prod(torch.arange(B), torch.arange(T)).tolist():
        p_V, q_V = one_BTV[row, place], other_BTV[row, place]
        wanted = (kl(p_V, q_V) + kl(q_V, p_V)) / 2 if labels_BT[row, place] != IGNORE else torch.zeros(())
        torch.testing.assert_close(found_BT[row, place], wanted.double(), rtol=0, atol=1e-12)
    assert torch.equal(symmetric_kl(other_BTV, one_BTV, labels_BT), found_BT)
    assert symmetric_kl(one_BTV, one_BTV, labels_BT).abs().max() == 0


def test_what_is_not_allowed_takes_no_part() -> None:
    one_BTV, other_BTV, labels_BT = passes()
    allowed_BTV = torch.zeros(B, T, V, dtype=torch.bool)
    allowed_BTV[..., [1, 3, 4]] = True
    leaf = one_BTV.clone().requires_grad_()
    found_BT = symmetric_kl(leaf, other_BTV, labels_BT, allowed_BTV=allowed_BTV)
    among_BT = symmetric_kl(one_BTV[..., [1, 3, 4]], other_BTV[..., [1, 3, 4]], labels_BT)
    torch.testing.assert_close(found_BT, among_BT, rtol=0, atol=1e-12)
    found_BT.sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad[~allowed_BTV].abs().max() == 0

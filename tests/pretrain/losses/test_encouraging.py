"""The encouraging loss: its formula, a slope that does not break, and a gradient that does not fade."""

import math

import pytest
import torch

from pretrain.losses.encouraging import bonus
from pretrain.losses.tokens import token_losses


@pytest.mark.parametrize("end", [0.5, 0.75, 0.9])
def test_the_formula_on_both_sides_of_its_end(end: float) -> None:
    p_P = torch.linspace(0.01, 0.999, 200, dtype=torch.float64)
    found_P = bonus(-p_P.log(), end)
    for p, found in zip(p_P.tolist(), found_P.tolist()):
        wanted = math.log(1 - p) if p <= end else math.log(1 - end) - (p - end) / (1 - end)
        assert found == pytest.approx(wanted, abs=1e-12)


def test_the_slope_is_one_at_the_end_from_both_sides() -> None:
    end, step = 0.75, 1e-6
    p_3 = torch.tensor([end - step, end, end + step], dtype=torch.float64)
    below, at, above = bonus(-p_3.log(), end).tolist()
    assert (at - below) / step == pytest.approx(-1 / (1 - end), rel=1e-4)
    assert (above - at) / step == pytest.approx(-1 / (1 - end), rel=1e-4)


def test_a_token_that_is_right_keeps_its_gradient() -> None:
    """Of -log p the logit's gradient is p - 1; with log(1 - p) it is -1, beyond the end p - 1 - p (1 - p) / (1 - e)."""
    for z in (-3.0, 0.0, 0.9, 2.0, 6.0):
        logits_11V = torch.tensor([[[z, 0.0]]], dtype=torch.float64, requires_grad=True)
        nll_11 = token_losses(logits_11V, torch.tensor([[0]]))
        (nll_11 + bonus(nll_11, 0.75)).sum().backward()
        p = 1 / (1 + math.exp(-z))
        wanted = -1.0 if p <= 0.75 else p - 1 - p * (1 - p) / 0.25
        assert logits_11V.grad[0, 0, 0].item() == pytest.approx(wanted, abs=1e-9)

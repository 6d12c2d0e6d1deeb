"""Scores with intervals: hand-computed cases, and that degenerate models score at chance, not at one."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.metrics.classification import mean_per_class, top_k
from pretrain.metrics.interval import proportion
from pretrain.metrics.ranking import ranks, ranks_of_pairs


def test_wilson_interval() -> None:
    score = proportion(20, 100)
    assert (score.value, score.count) == (0.2, 100)
    assert score.low == pytest.approx(0.1334, abs=1e-4)
    assert score.high == pytest.approx(0.2888, abs=1e-4)
    assert proportion(0, 10).low == 0.0
    assert str(score) == "20.0 % [13.3, 28.9]"
    with pytest.raises(ValueError, match="zero samples"):
        proportion(0, 0)


def test_top_k_counts_ties_against_us() -> None:
    logits_NK = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    target_N = torch.tensor([0, 1, 2])
    assert top_k(logits_NK, target_N, 1).value == pytest.approx(1 / 3)
    assert top_k(logits_NK, target_N, 2).value == pytest.approx(2 / 3)
    assert top_k(logits_NK, target_N, 3).value == 1.0
    assert mean_per_class(logits_NK, torch.tensor([0, 0, 2])) == pytest.approx(0.25)


def test_ranks_by_hand() -> None:
    eye = torch.eye(4)
    own = torch.arange(4)
    assert ranks(eye, eye, own, own).tolist() == [0, 0, 0, 0]
    assert ranks(eye, eye.roll(1, 0), own, own).min() > 0
    assert ranks(torch.ones(4, 2), torch.ones(4, 2), own, own).tolist() == [3, 3, 3, 3]


def test_five_captions_an_image() -> None:
    """A picture is found when any of its captions is first; each caption has one picture."""
    torch.manual_seed(0)
    image_NE = F.normalize(torch.randn(7, 16), dim=1)
    owner = torch.arange(7).repeat_interleave(5)
    text_GE = F.normalize(torch.randn(35, 16), dim=1)
    text_GE[::5] = image_NE  # one of the five is perfect
    assert ranks(image_NE, text_GE, torch.arange(7), owner).tolist() == [0] * 7
    whole = ranks(text_GE, image_NE, owner, torch.arange(7))
    assert torch.equal(whole, ranks(text_GE, image_NE, owner, torch.arange(7), chunk=3))
    assert whole[::5].tolist() == [0] * 7


def test_ranks_of_pairs_are_ranks_where_each_item_has_one_owner() -> None:
    draw = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, 8, generator=draw), dim=1) for n in (7, 21))
    owner = torch.arange(21) // 3
    right = torch.stack([owner, torch.arange(21)], dim=1)[torch.randperm(21, generator=draw)]
    assert torch.equal(ranks_of_pairs(image, text, right, chunk=3), ranks(image, text, torch.arange(7), owner))
    assert torch.equal(ranks_of_pairs(text, image, right.flip(1), chunk=4), ranks(text, image, owner, torch.arange(7)))
    eye = torch.eye(3)
    both = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2]])  # the second item is right for two queries
    assert ranks_of_pairs(eye[[0, 0, 2]], eye, both).tolist() == [0, 2, 0]
    assert ranks_of_pairs(torch.ones(3, 2), torch.ones(3, 2), both).tolist() == [1, 2, 2]

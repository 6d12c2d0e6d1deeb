"""Boxes: overlap, and the share of expressions whose box is found (Acc@0.5; Yu et al. 2016, arXiv:1608.00272).

Letters: K = boxes; the four numbers are x0 y0 x1 y1, in any one unit, with continuous coordinates (no + 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.metrics.interval import Score, proportion


def iou(left_K4: Tensor, right_K4: Tensor) -> Tensor:
    """Return intersection over union of each pair, [K]; 0 where a box has no area."""
    common_K = _common(left_K4, right_K4)
    union_K = _area(left_K4) + _area(right_K4) - common_K
    return torch.where(common_K > 0, common_K / union_K, 0.0)


def covered(left_K4: Tensor, right_K4: Tensor) -> Tensor:
    """Return the share of each left box that the right one covers, [K]: for cells of a grid, smaller than any box."""
    common_K = _common(left_K4, right_K4)
    return torch.where(common_K > 0, common_K / _area(left_K4), 0.0)


def _common(left_K4: Tensor, right_K4: Tensor) -> Tensor:
    low_K2 = torch.maximum(left_K4[:, :2], right_K4[:, :2])
    high_K2 = torch.minimum(left_K4[:, 2:], right_K4[:, 2:])
    return (high_K2 - low_K2).clamp(min=0).prod(1)


def _area(box_K4: Tensor) -> Tensor:
    return (box_K4[:, 2:] - box_K4[:, :2]).clamp(min=0).prod(1)


def accuracy(iou_N: Sequence[float], threshold: float = 0.5) -> Score:
    """Return the share of expressions whose box overlaps enough; exactly the threshold is enough."""
    return proportion(sum(value >= threshold for value in iou_N), len(iou_N))

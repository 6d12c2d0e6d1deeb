"""Classification: top-k accuracy and accuracy averaged over classes.

Shapes: N = samples, K = classes.
"""

import torch
from torch import Tensor

from pretrain.metrics.interval import Score, proportion


def top_k(logits_NK: Tensor, target_N: Tensor, k: int) -> Score:
    """Return the share of samples whose class is among the k highest logits; ties count against us."""
    right_N1 = logits_NK.gather(1, target_N[:, None])
    above_N = (logits_NK >= right_N1).sum(1) - 1  # the right class itself is not above
    return proportion(int((above_N < k).sum()), len(target_N))


def mean_per_class(logits_NK: Tensor, target_N: Tensor) -> float:
    """Return the mean over classes of each class's accuracy; classes without samples do not count."""
    right_N = (logits_NK.argmax(1) == target_N).double()
    count_K = torch.bincount(target_N, minlength=logits_NK.shape[1])
    hits_K = torch.bincount(target_N, weights=right_N, minlength=logits_NK.shape[1])
    return float((hits_K / count_K)[count_K > 0].mean())

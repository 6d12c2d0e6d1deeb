"""What a token that is already likely still adds to the gradient: the encouraging loss (Zhao et al. 2021,
arXiv:2110.06537, "Well-classified examples are underestimated"), which OFA's later recipes add to cross-entropy.

With p the probability of the right token, a bonus is added to its cross-entropy -log p:

    bonus(p) = log(1 - p)                                       for p <= e
               log(1 - e) - (p - e) / (1 - e)                   above: the tangent at e, so that nothing diverges

So the gradient of the logit of a token that is right does not fade as p comes near to 1; without the tangent (e = 1) it
would stay -1 for good.
"""

import math

import torch
from torch import Tensor


def bonus(nll: Tensor, end: float) -> Tensor:
    """Return the bonus, zero or less, of tokens whose cross-entropy is `nll`; `end`, in (0, 1), is e above."""
    assert 0 < end < 1, "the tangent needs a finite slope"
    p = torch.exp(-nll)
    line = math.log(1 - end) - (p - end) / (1 - end)
    return torch.where(p <= end, torch.log1p(-p.clamp(max=end)), line)

"""How far two passes under dropout disagree: R-Drop (Liang et al. 2021, arXiv:2106.14448, equation 3), as OFA uses it.

A batch is computed twice, each time with dropout of its own. Beside the cross-entropy of both passes, the distributions
P and Q of each token are drawn together:

    L = CE(P) + CE(Q) + weight * 1/2 (KL(P || Q) + KL(Q || P))

Shapes: B = rows, T = tokens, V = vocabulary.
"""

import torch
from torch import Tensor

from pretrain.losses.tiles import full
from pretrain.losses.tokens import IGNORE


def symmetric_kl(one_BTV: Tensor, other_BTV: Tensor, labels_BT: Tensor, *, allowed_BTV: Tensor | None = None) -> Tensor:
    """Return 1/2 (KL(P || Q) + KL(Q || P)) of each token [B, T] from two passes' logits; 0 where the label is IGNORE.

    `allowed_BTV`: bool, what P and Q are distributions over; None: the whole vocabulary.
    """
    p_BTV, q_BTV = (_log_softmax(logits, allowed_BTV) for logits in (one_BTV, other_BTV))
    # sum of P (log P - log Q) and Q (log Q - log P) is that of (P - Q) (log P - log Q)
    terms_BTV = (p_BTV.exp() - q_BTV.exp()) * (p_BTV - q_BTV)
    if allowed_BTV is not None:
        terms_BTV = terms_BTV.masked_fill(~allowed_BTV, 0.0)
    return (terms_BTV.sum(-1) / 2).masked_fill(labels_BT == IGNORE, 0.0)


def _log_softmax(logits_BTV: Tensor, allowed_BTV: Tensor | None) -> Tensor:
    scores_BTV = full(logits_BTV)
    if allowed_BTV is not None:
        scores_BTV = scores_BTV.masked_fill(~allowed_BTV, torch.finfo(scores_BTV.dtype).min)
    return scores_BTV.log_softmax(-1)

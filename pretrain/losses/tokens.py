"""Cross-entropy of tokens: smoothed, over a set of allowed tokens, one loss a token; sums and sample means of these.

With logits z, of which all outside the allowed set A count as minus infinity (A: the whole vocabulary where none is
given), and p = softmax(z) over A, the loss of a token y is

    (1 - e - e') (-log p[y]) + e' sum over a in A of (-log p[a]),    e' = e / (|A| - 1)

(label smoothing as in Wang et al. 2022, arXiv:2202.03052; with e = 0 it is cross-entropy). Its gradient is
p - (1 - e - e') [a = y] - e' [a in A]: so only the logits and one number a token are kept for the backward pass, and
what is computed in single precision is a span of tokens at a time, whatever the logits are.

Shapes: B = rows, T = tokens, V = vocabulary, M = B T tokens, m = tokens of a span.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from pretrain.losses.tiles import full, spans

IGNORE = -100  #: the label of a token that does not count
#: logits of a span: what is computed at once. A CPU wants it in its cache, a GPU few and large kernels
SPAN = {"cpu": 1 << 19, "cuda": 1 << 25}


def token_losses(
    logits_BTV: Tensor, labels_BT: Tensor, *, smoothing: float = 0.0, allowed_BTV: Tensor | None = None
) -> Tensor:
    """Return each token's loss [B, T] in at least single precision; 0 where the label is IGNORE.

    Args:
        logits_BTV: scores of each token of the vocabulary at each place.
        labels_BT: int64, the token that belongs there, or IGNORE.
        smoothing: e of the formula above, in [0, 1).
        allowed_BTV: bool, broadcast to the logits: the set A of each place. A label outside of it costs infinity.
    """
    width = logits_BTV.shape[-1]
    allowed_MV = None if allowed_BTV is None else allowed_BTV.expand(logits_BTV.shape).reshape(-1, width)
    losses_M = _Losses.apply(logits_BTV.reshape(-1, width), labels_BT.reshape(-1), smoothing, allowed_MV)
    return losses_M.view(labels_BT.shape)  # type: ignore[no-any-return]


def token_sum(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    *,
    weight_B: Tensor | None = None,
    smoothing: float = 0.0,
    allowed_BTV: Tensor | None = None,
) -> Tensor:
    """Return each row's loss [B], the sum over its tokens times the row's weight; see `token_losses`.

    Divided by the global count of labels that are not IGNORE, the sum over all rows is the mean over all tokens.
    """
    loss_B = token_losses(logits_BTV, labels_BT, smoothing=smoothing, allowed_BTV=allowed_BTV).sum(1)
    return loss_B if weight_B is None else loss_B * weight_B


def sample_mean(losses_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return each row's mean [B] over its tokens that count: a row counts the same whatever its length; 0 if none do.

    Cho et al. 2021, arXiv:2102.02779.
    """
    return losses_BT.sum(1) / count_B(labels_BT).clamp(min=1)


def count_B(labels_BT: Tensor) -> Tensor:
    """Return how many tokens of each row count, [B]."""
    return (labels_BT != IGNORE).sum(1)


class _Losses(torch.autograd.Function):
    """One loss a token [M] from logits [M, V]."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M: Tensor, smoothing: float, allowed_MV: Tensor | None) -> Tensor:
        losses_M = full(logits_MV[:, 0]).new_zeros(len(logits_MV))
        total_M = torch.zeros_like(losses_M)  # log of the sum of exp
        for span in _spans(logits_MV):
            scores_mV, allowed_mV = _allowed(logits_MV[span], None if allowed_MV is None else allowed_MV[span])
            total_M[span] = scores_mV.logsumexp(1)
            own_m1 = labels_M[span].clamp(min=0)[:, None]
            right_m = total_M[span] - scores_mV.gather(1, own_m1)[:, 0]
            if smoothing:
                size_m, each_m = _shares(scores_mV, allowed_mV, smoothing)
                among_mV = scores_mV if allowed_mV is None else scores_mV.masked_fill(~allowed_mV, 0.0)
                right_m = (1 - smoothing - each_m) * right_m + each_m * (size_m * total_M[span] - among_mV.sum(1))
            losses_M[span] = right_m.masked_fill(labels_M[span] == IGNORE, 0.0)
        ctx.save_for_backward(logits_MV, labels_M, total_M, allowed_MV)
        ctx.smoothing = smoothing
        return losses_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_MV, labels_M, total_M, allowed_MV = ctx.saved_tensors
        grad_MV = torch.empty_like(logits_MV)
        for span in _spans(logits_MV):
            scores_mV, allowed_mV = _allowed(logits_MV[span], None if allowed_MV is None else allowed_MV[span])
            out_mV = (scores_mV - total_M[span][:, None]).exp_()
            own_m1, right_m1 = labels_M[span].clamp(min=0)[:, None], out_mV.new_ones(len(out_mV), 1)
            if ctx.smoothing:
                _, each_m = _shares(scores_mV, allowed_mV, ctx.smoothing)
                out_mV -= each_m[:, None] if allowed_mV is None else each_m[:, None] * allowed_mV
                right_m1 = right_m1 - ctx.smoothing - each_m[:, None]
            out_mV.scatter_add_(1, own_m1, -right_m1)
            pull_m = grads[0][span].masked_fill(labels_M[span] == IGNORE, 0.0)
            grad_MV[span] = out_mV.mul_(pull_m[:, None])
        return grad_MV, None, None, None


def _spans(logits_MV: Tensor) -> list[slice]:
    cells = SPAN.get(logits_MV.device.type, SPAN["cuda"])
    found = spans(len(logits_MV), max(1, cells // logits_MV.shape[1]))
    # a rehearsal (planning/rehearsal.py) computes nothing, and spans are alike: three stand for thousands
    return [*found[:2], found[-1]] if is_fake(logits_MV) and len(found) > 2 else found


def _allowed(logits_mV: Tensor, allowed_mV: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return scores in full precision, minus infinity outside the allowed set, and the set."""
    scores_mV = full(logits_mV)
    return scores_mV if allowed_mV is None else scores_mV.masked_fill(~allowed_mV, -torch.inf), allowed_mV


def _shares(scores_mV: Tensor, allowed_mV: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return |A| and e' of each token, [m]; a set of one has nothing to share: its loss is 0 in any case."""
    every = scores_mV.new_full((len(scores_mV),), scores_mV.shape[1])
    size_m = every if allowed_mV is None else allowed_mV.sum(1).to(scores_mV.dtype)
    return size_m, torch.where(size_m > 1, smoothing / (size_m - 1).clamp(min=1), 0.0)

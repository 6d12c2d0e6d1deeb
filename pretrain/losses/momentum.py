"""Softmax contrastive loss against keys that get no gradient, with targets that are partly what a trailing model sees.

For a row's feature x, keys k_j of all ranks and of earlier steps, and the trailing model's feature x' of the same row:

    loss = -sum_j y_j log softmax_j(s x . k)_j = logsumexp_j(s x . k_j) - s x . sum_j y_j k_j
    y    = (1 - a) [j in P] / |P| + a softmax_j(s x' . k)_j

P are the keys whose caption is the row's, its own among them. This is ALBEF's image-text contrast with momentum
distillation (Li et al. 2021, arXiv:2107.07651, sections 3.2 and 3.3, equations 1 and 6); without a it is MoCo's.

Keys are constants, so targets come in by one vector a row, sum_j y_j k_j, and the gradient by another, the mean of the
keys under softmax(s x . k): attention of the rows over the keys, in one pass over tiles. Forward makes both, backward
computes no logit again, and only keys are sent around.

Shapes: B = local rows, K = keys, t u = rows and keys of a tile, E = embedding width.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain import dist
from pretrain.losses import tiles
from pretrain.losses.contrastive import alike


def attended(x_BE: Tensor, keys_KE: Tensor, absent_K: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """Return for each row the logsumexp over x . k_j [B] and the mean of the keys under their softmax [B, E].

    `absent_K` says which places hold no key; the first holds one.
    """
    work, lse_B, mean_BE = tiles.Tiles(x_BE, tile), x_BE.new_empty(len(x_BE)), torch.empty_like(x_BE)
    for span in tiles.spans(len(x_BE), tile):
        x_tE = x_BE[span]
        top_t, sum_t, mean_tE = x_tE.new_full((len(x_tE),), -torch.inf), x_tE.new_zeros(len(x_tE)), mean_BE[span]
        mean_tE.zero_()
        for across, logits_tu in work.along(x_tE, keys_KE):
            if absent_K is not None:
                logits_tu.masked_fill_(absent_K[across], -torch.inf)
            higher_t = torch.maximum(top_t, logits_tu.amax(1))
            fade_t = (top_t - higher_t).exp_()
            weight_tu = logits_tu.sub_(higher_t[:, None]).exp_()
            sum_t.mul_(fade_t).add_(weight_tu.sum(1))
            mean_tE.mul_(fade_t[:, None]).addmm_(weight_tu, keys_KE[across])
            top_t = higher_t
        lse_B[span] = sum_t.log().add_(top_t)
        mean_tE.div_(sum_t[:, None])
    return lse_B, mean_BE


class _TowardsKeys(torch.autograd.Function):
    """The mean over local rows of logsumexp_j(s x . k_j) - s x . target."""

    @staticmethod
    def forward(
        ctx: Any, x_BE: Tensor, scale: Tensor, keys_KE: Tensor, target_BE: Tensor, absent_K: Tensor | None, tile: int
    ) -> Tensor:
        lse_B, mean_BE = attended(x_BE * scale, keys_KE, absent_K, tile)
        ctx.save_for_backward(x_BE, scale, mean_BE.sub_(target_BE))
        return (lse_B - scale * (x_BE * target_BE).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BE, scale, apart_BE = ctx.saved_tensors
        weight = grads[0] / len(x_BE)
        return apart_BE * (weight * scale), (weight * (x_BE * apart_BE).sum()).view_as(scale), None, None, None, None


@torch.no_grad()
def targets(
    own_BE: Tensor,
    keys_KE: Tensor,
    *,
    scale: Tensor,
    alpha: float,
    same_K: Tensor | None,
    absent_K: Tensor | None,
    tile: int,
) -> Tensor:
    """Return sum_j y_j k_j of each local row, [B, E]; see `towards_keys`."""
    rows = slice(dist.rank() * len(own_BE), (dist.rank() + 1) * len(own_BE))
    if same_K is None:
        hard_BE = keys_KE[rows]
    else:
        # as in contrastive.py: more than two equal captions are added up in any order on a GPU
        groups = alike(same_K, keys_KE.dtype)
        sums_KE = torch.zeros_like(keys_KE).index_add_(0, groups.group_M, keys_KE)
        hard_BE = sums_KE[groups.group_M[rows]] * groups.share_M[rows, None]
    if alpha == 0:
        return hard_BE
    return torch.lerp(hard_BE, attended(own_BE * scale, keys_KE, absent_K, tile)[1], alpha)


def towards_keys(
    x_BE: Tensor,
    own_BE: Tensor,
    keys_KE: Tensor,
    *,
    scale: Tensor,
    alpha: float = 0.0,
    same_K: Tensor | None = None,
    absent_K: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """Return this rank's loss of one direction, a scalar whose mean over ranks is the global loss.

    Gradients flow to x_BE and the scale; targets are constants. All ranks must hold equally many rows.

    Args:
        x_BE: unit-norm features of the local rows, of one side. Half precision is computed in single.
        own_BE: the trailing model's features of the same rows and side.
        keys_KE: the trailing model's features of the other side: first the rows of all ranks, in rank order, then any.
        scale: 1 / temperature, [1].
        alpha: share of the target that is the trailing model's softmax.
        same_K: int64, equal where two keys have equal captions; None: a row's own key is the only hard target.
        absent_K: bool, places without a key, none of them among the rows of this step; None: there are none.
        tile: rows and keys of logits held at once; None: what suits the device.
    """
    with torch.autocast(x_BE.device.type, enabled=False):
        x_BE, own_BE, keys_KE = tiles.full(x_BE), tiles.full(own_BE.detach()), tiles.full(keys_KE.detach())
        scale, size = scale.to(x_BE), tile or tiles.side(x_BE.device)
        target_BE = targets(own_BE, keys_KE, scale=scale, alpha=alpha, same_K=same_K, absent_K=absent_K, tile=size)
        loss: Tensor = _TowardsKeys.apply(x_BE, scale, keys_KE, target_BE, absent_K, size)
    return loss

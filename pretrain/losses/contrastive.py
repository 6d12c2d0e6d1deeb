"""Softmax contrastive loss on local rows, in tiles, so that no N x N matrix is ever kept.

For each local row i with positives P(i) (rows with the same caption, itself among them):

    loss_i = logsumexp_j(s x_i . y_j) - mean_{j in P(i)}(s x_i . y_j)

With one positive a row this is the InfoNCE of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3).
The backward pass computes each tile again instead of keeping it.

Shapes: B = local rows, M = rows of all ranks, t = rows of a tile, E = embedding width.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain import dist

TILE = 1024  #: rows of logits held at once


class _RowLoss(torch.autograd.Function):
    """Mean over local rows of loss_i; gradients for x (already scaled) and y by recomputation."""

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor, y_ME: Tensor, same_B: Tensor, same_M: Tensor, tile: int) -> Tensor:
        lse = []
        loss = x_BE.new_zeros(())
        for x_tE, same_t in zip(x_BE.split(tile), same_B.split(tile)):
            logits_tM = x_tE @ y_ME.T
            positive_tM = same_t[:, None] == same_M
            lse.append(logits_tM.logsumexp(1))
            mean_t = logits_tM.masked_fill_(~positive_tM, 0).sum(1) / positive_tM.sum(1)
            loss += (lse[-1] - mean_t).sum()
        ctx.save_for_backward(x_BE, y_ME, same_B, same_M, torch.cat(lse))
        ctx.tile = tile
        return loss / len(x_BE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BE, y_ME, same_B, same_M, lse_B = ctx.saved_tensors
        dx_BE, dy_ME = torch.empty_like(x_BE), torch.zeros_like(y_ME)
        start = 0
        for x_tE, same_t in zip(x_BE.split(ctx.tile), same_B.split(ctx.tile)):
            rows = slice(start, start + len(x_tE))
            start += len(x_tE)
            positive_tM = same_t[:, None] == same_M
            p_tM = (x_tE @ y_ME.T).sub_(lse_B[rows, None]).exp_()
            p_tM -= positive_tM / positive_tM.sum(1, keepdim=True)
            p_tM *= grads[0] / len(x_BE)
            dx_BE[rows] = p_tM @ y_ME
            dy_ME.addmm_(p_tM.T, x_tE)
        return dx_BE, dy_ME, None, None, None


def contrastive(
    image_BE: Tensor, text_BE: Tensor, *, scale: Tensor, same_B: Tensor | None = None, tile: int = TILE
) -> Tensor:
    """Return this rank's symmetric contrastive loss, a scalar whose mean over ranks is the global loss.

    Gradients flow through the gathered rows of all ranks, so the mean over ranks of the gradients is
    the gradient of the whole batch on one device, exactly.

    Args:
        image_BE: unit-norm image features of the local rows.
        text_BE: unit-norm text features of the same rows.
        scale: exp(logit_scale), [1].
        same_B: int64, equal where two rows are positives of each other; None: only the pair itself.
        tile: rows of logits held at once.
    """
    text_ME, image_ME = dist.gather_with_grad(text_BE), dist.gather_with_grad(image_BE)
    if same_B is None:
        same_B = torch.arange(len(image_BE), device=image_BE.device) + dist.rank() * len(image_BE)
    same_M = dist.gather(same_B)
    with torch.autocast(image_BE.device.type, enabled=False):
        to_text = _RowLoss.apply(scale * image_BE, text_ME, same_B, same_M, tile)
        to_image = _RowLoss.apply(scale * text_BE, image_ME, same_B, same_M, tile)
    return (to_text + to_image) / 2

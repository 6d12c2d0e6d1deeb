"""Sigmoid loss: every pair is its own yes-or-no question; text blocks travel round a ring of ranks.

    loss = sum_ij softplus(-z_ij (s x_i . y_j + b)) / rows,   z = +1 for a match, -1 otherwise

(SigLIP, Zhai et al. 2023, arXiv:2303.15343, algorithm 1.) Each rank holds one block of texts at a
time and at most `tile` rows of logits; on the way back the blocks travel again, followed by their
gradients, which arrive home after W hops. Exact at every world size.

Shapes: B = local rows, t = rows of a tile, E = embedding width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist
from pretrain.losses.contrastive import TILE


def _pass_on(*tensors: Tensor) -> list[Tensor]:
    """Send tensors to the previous rank and return those of the next."""
    world, rank = dist.world(), dist.rank()
    received = [torch.empty_like(t) for t in tensors]
    jobs = []
    for out, back in zip(tensors, received):
        jobs.append(torch_dist.P2POp(torch_dist.isend, out.contiguous(), (rank - 1) % world))
        jobs.append(torch_dist.P2POp(torch_dist.irecv, back, (rank + 1) % world))
    for job in torch_dist.batch_isend_irecv(jobs):
        job.wait()
    return received


def _tiles(x_BE: Tensor, y_BE: Tensor, bias: Tensor, *, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (local rows, their logits against one block of texts), a tile at a time."""
    for start in range(0, len(x_BE), tile):
        rows = slice(start, start + tile)
        yield rows, torch.addmm(bias, x_BE[rows], y_BE.T)


class _RingLoss(torch.autograd.Function):
    """Sum over local rows and all columns, divided by local rows; x is already scaled."""

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor, y_BE: Tensor, bias: Tensor, same_B: Tensor, tile: int) -> Tensor:
        ctx.save_for_backward(x_BE, y_BE, bias, same_B)
        ctx.tile = tile
        loss, block_BE, theirs_B = x_BE.new_zeros(()), y_BE, same_B
        for hop in range(dist.world()):
            for rows, logits_tB in _tiles(x_BE, block_BE, bias, tile=tile):
                sign_tB = torch.where(same_B[rows, None] == theirs_B, -1.0, 1.0).to(logits_tB)
                loss += F.softplus(logits_tB.mul_(sign_tB)).sum()
            if hop + 1 < dist.world():
                block_BE, theirs_B = _pass_on(block_BE, theirs_B)
        return loss / len(x_BE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BE, y_BE, bias, same_B = ctx.saved_tensors
        dx_BE, dbias = torch.zeros_like(x_BE), torch.zeros_like(bias)
        block_BE, theirs_B, dy_BE = y_BE, same_B, torch.zeros_like(y_BE)
        for _ in range(dist.world()):
            for rows, logits_tB in _tiles(x_BE, block_BE, bias, tile=ctx.tile):
                # d softplus(-z l) / dl = -z sigmoid(-z l) = sigmoid(l) - [z = 1]
                d_tB = logits_tB.sigmoid_().sub_((same_B[rows, None] == theirs_B).to(logits_tB))
                d_tB *= grads[0] / len(x_BE)
                dx_BE[rows] += d_tB @ block_BE
                dy_BE.addmm_(d_tB.T, x_BE[rows])
                dbias += d_tB.sum()
            if dist.world() > 1:  # the last hop brings each block's gradient home
                block_BE, theirs_B, dy_BE = _pass_on(block_BE, theirs_B, dy_BE)
        return dx_BE, dy_BE, dbias, None, None


def sigmoid(
    image_BE: Tensor,
    text_BE: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    same_B: Tensor | None = None,
    tile: int = TILE,
) -> Tensor:
    """Return this rank's sigmoid loss, a scalar whose mean over ranks is the global loss.

    Args:
        image_BE: unit-norm image features of the local rows.
        text_BE: unit-norm text features of the same rows.
        scale: exp(logit_scale), [1].
        bias: added to every logit, [1].
        same_B: int64, equal where two rows match each other; None: only the pair itself.
        tile: rows of logits held at once.
    """
    if same_B is None:
        same_B = torch.arange(len(image_BE), device=image_BE.device) + dist.rank() * len(image_BE)
    with torch.autocast(image_BE.device.type, enabled=False):
        return _RingLoss.apply(scale * image_BE, text_BE, bias, same_B, tile)  # type: ignore[no-any-return]

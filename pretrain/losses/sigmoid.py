"""Sigmoid loss: every pair is its own yes-or-no question; text blocks travel round a ring of ranks.

    loss = sum_ij softplus(-z_ij (s x_i . y_j + b)) / rows,   z = +1 for a match, -1 otherwise

(SigLIP, Zhai et al. 2023, arXiv:2303.15343, algorithm 1.) Each rank holds one block of texts at a
time and one tile of logits, which the backward pass computes again; then the blocks travel again, followed by their
gradients, which arrive home after W hops. Exact at every world size.

Shapes: B = local rows, t u = rows and columns of a tile, E = embedding width.
"""

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist
from pretrain.losses import tiles


def _pass_on(*tensors: Tensor | None) -> list[Any]:
    """Send tensors to the previous rank and return those of the next; None stays None."""
    world, rank = dist.world(), dist.rank()
    received = [None if t is None else torch.empty_like(t) for t in tensors]
    jobs = []
    for out, back in zip(tensors, received):
        if out is None or back is None:
            continue
        jobs.append(torch_dist.P2POp(torch_dist.isend, out.contiguous(), (rank - 1) % world))
        jobs.append(torch_dist.P2POp(torch_dist.irecv, back, (rank + 1) % world))
    for job in torch_dist.batch_isend_irecv(jobs):
        job.wait()
    return received


def _matches(same: tuple[Tensor, Tensor] | None, rows: slice, columns: slice, *, home: bool, like: Tensor) -> Any:
    """Return which entries of a tile match, bool [t, u], or None where none does and there is nothing to look for.

    `same` None: a row matches its own text only, which is on the diagonal of this rank's own block (`home`).
    """
    if same is not None:
        return same[0][rows, None] == same[1][columns]
    if not home or rows.start >= columns.stop or columns.start >= rows.stop:
        return None
    at = torch.arange(max(rows.stop, columns.stop), device=like.device)
    return at[rows, None] == at[columns]


class _RingLoss(torch.autograd.Function):
    """Sum over local rows and all columns, divided by local rows; x is already scaled."""

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor, y_BE: Tensor, bias: Tensor, same_B: Tensor | None, tile: int) -> Tensor:
        ctx.save_for_backward(x_BE, y_BE, bias, same_B)
        ctx.tile = tile
        loss_B, work = x_BE.new_zeros(len(x_BE)), tiles.Tiles(x_BE, tile)
        block_BE, theirs_B = y_BE, same_B
        for hop in range(dist.world()):
            same = None if same_B is None or theirs_B is None else (same_B, theirs_B)
            for rows in tiles.spans(len(x_BE), tile):
                for columns, logits_tu in work.along(x_BE[rows], block_BE):
                    logits_tu += bias
                    match_tu = _matches(same, rows, columns, home=hop == 0, like=x_BE)
                    if match_tu is not None:
                        logits_tu = torch.where(match_tu, -logits_tu, logits_tu)
                    loss_B[rows] += F.softplus(logits_tu).sum(1)
            if hop + 1 < dist.world():
                block_BE, theirs_B = _pass_on(block_BE, theirs_B)
        return loss_B.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BE, y_BE, bias, same_B = ctx.saved_tensors
        dx_BE, dbias, work = torch.zeros_like(x_BE), torch.zeros_like(bias), tiles.Tiles(x_BE, ctx.tile)
        block_BE, theirs_B, dy_BE = y_BE, same_B, torch.zeros_like(y_BE)
        for hop in range(dist.world()):
            same = None if same_B is None or theirs_B is None else (same_B, theirs_B)
            for rows in tiles.spans(len(x_BE), ctx.tile):
                for columns, logits_tu in work.along(x_BE[rows], block_BE):
                    # d softplus(-z l) / dl = -z sigmoid(-z l) = sigmoid(l) - [z = 1]
                    d_tu = logits_tu.add_(bias).sigmoid_()
                    match_tu = _matches(same, rows, columns, home=hop == 0, like=x_BE)
                    if match_tu is not None:
                        d_tu -= match_tu.to(d_tu)
                    dx_BE[rows].addmm_(d_tu, block_BE[columns])
                    dy_BE[columns].addmm_(d_tu.T, x_BE[rows])
                    dbias += d_tu.sum()
            if dist.world() > 1:  # the last hop brings each block's gradient home
                block_BE, theirs_B, dy_BE = _pass_on(block_BE, theirs_B, dy_BE)
        weight = grads[0] / len(x_BE)
        return dx_BE.mul_(weight), dy_BE.mul_(weight), dbias.mul_(weight), None, None


def sigmoid(
    image_BE: Tensor,
    text_BE: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    same_B: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """Return this rank's sigmoid loss, a scalar whose mean over ranks is the global loss.

    Args:
        image_BE: unit-norm image features of the local rows.
        text_BE: unit-norm text features of the same rows.
        scale: exp(logit_scale), [1].
        bias: added to every logit, [1].
        same_B: int64, equal where two rows match each other; None: only the pair itself.
        tile: rows and columns of logits held at once; None: what suits the device.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        image_BE, text_BE = tiles.full(image_BE), tiles.full(text_BE)
        size = tile or tiles.side(image_BE.device)
        scaled_BE = scale.to(image_BE) * image_BE
        return _RingLoss.apply(scaled_BE, text_BE, bias.to(image_BE), same_B, size)  # type: ignore[no-any-return]

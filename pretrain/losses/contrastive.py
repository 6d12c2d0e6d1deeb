"""Softmax contrastive loss of all ranks' rows, in tiles: no N x N matrix is kept, and each tile serves both directions.

With logits S = s X Y^T over all pairs and P(i) the rows whose caption is that of row i (itself among them):

    loss = mean_i [ (logsumexp_j S_ij + logsumexp_j S_ji) / 2 - mean_{j in P(i)} S_ij ]

With one positive a row this is the InfoNCE of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3). Rows of equal
captions are each other's positives, so the mean over P(i) adds up to the same for rows and for columns.

A rank holds the rows of S that belong to its pictures, against the texts of all ranks: their logsumexp is its own
business, that of the columns is put together by two all-reduces of M numbers. Only texts are gathered. The backward
pass computes each tile again and takes both directions' gradients from it: four matrix products, where two separate
cross-entropies need six. What is gathered with gradient is no option, so that no wrong combination can be asked for.

Shapes: B = local rows, M = rows of all ranks, t u = rows and columns of a tile, E = embedding width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain import dist
from pretrain.losses import tiles


class Alike(NamedTuple):
    """Which rows of all ranks have equal captions."""

    group_M: Tensor  #: int64, equal for equal captions, below M
    share_M: Tensor  #: 1 / |P(i)|


def alike(same_M: Tensor, dtype: torch.dtype) -> Alike:
    """Return the groups of equal values, without waiting for the device (unique would: it asks how many there are)."""
    sorted_M, order_M = same_M.sort(stable=True)
    fresh_M = torch.cat([sorted_M.new_zeros(1), (sorted_M[1:] != sorted_M[:-1]).long()])
    group_M = torch.empty_like(order_M).scatter_(0, order_M, fresh_M.cumsum(0))
    counts_M = torch.zeros(len(same_M), dtype=dtype, device=same_M.device)
    counts_M.index_add_(0, group_M, counts_M.new_ones(len(same_M)))
    return Alike(group_M, counts_M[group_M].reciprocal_())


class _Lse:
    """A logsumexp of many parts, kept as a maximum and a sum, so that rounding does not pile up."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.top = like.new_full((count,), -torch.inf)
        self.sum = like.new_zeros(count)

    def add(self, where: slice, logits_tu: Tensor, axis: int, *, scratch_tu: Tensor) -> None:
        """Take in a tile; its entries along `axis` belong to the places `where`."""
        top, total = self.top[where], self.sum[where]
        higher = torch.maximum(top, logits_tu.amax(axis))
        torch.sub(logits_tu, higher.unsqueeze(axis), out=scratch_tu).exp_()
        total.mul_((top - higher).exp_()).add_(scratch_tu.sum(axis))
        top.copy_(higher)

    def value(self) -> Tensor:
        """Return the logsumexp of all that was added."""
        return self.sum.log().add_(self.top)


class _BothDirections(torch.autograd.Function):
    """This rank's loss; the mean over ranks of its gradients is that of the whole batch."""

    @staticmethod
    def forward(
        ctx: Any, x_BE: Tensor, y_ME: Tensor, scale: Tensor, groups: Alike | None, first: int, tile: int
    ) -> Tensor:
        rows, columns = _Lse(x_BE, len(x_BE)), _Lse(x_BE, len(y_ME))
        work = tiles.Tiles(x_BE, tile)
        for span in tiles.spans(len(x_BE), tile):
            for across, logits_tu in work.along(x_BE[span] * scale, y_ME):
                rows.add(span, logits_tu, 1, scratch_tu=work.scratch(logits_tu))
                columns.add(across, logits_tu, 0, scratch_tu=work.scratch(logits_tu))
        row_B, column_M = rows.value(), dist.logsumexp(columns.value())
        ctx.save_for_backward(x_BE, y_ME, scale, row_B, column_M)
        ctx.groups, ctx.first, ctx.tile = groups, first, tile
        own = slice(first, first + len(x_BE))
        means = _Means(y_ME, groups, own)
        matched = [(means(span) * x_BE[span]).sum(1) for span in tiles.spans(len(x_BE), tile)]
        return ((row_B + column_M[own]) / 2 - scale * torch.cat(matched)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # dS_ij = (softmax over row i + softmax over column j - 2 [j in P(i)] / |P(i)|) / 2B, here without the 1 / 2B
        x_BE, y_ME, scale, row_B, column_M = ctx.saved_tensors
        own = slice(ctx.first, ctx.first + len(x_BE))
        means, work = _Means(y_ME, ctx.groups, own), tiles.Tiles(x_BE, ctx.tile)
        dx_BE, dscale = torch.empty_like(x_BE), torch.zeros_like(scale)
        dy_ME = torch.zeros_like(y_ME) if ctx.needs_input_grad[1] else None
        for span in tiles.spans(len(x_BE), ctx.tile):
            x_tE, d_tE = x_BE[span] * scale, means(span) * -2.0
            for across, logits_tu in work.along(x_tE, y_ME):
                column_tu = torch.sub(logits_tu, column_M[across], out=work.scratch(logits_tu)).exp_()
                p_tu = logits_tu.sub_(row_B[span, None]).exp_().add_(column_tu)
                d_tE.addmm_(p_tu, y_ME[across])
                if dy_ME is not None:
                    dy_ME[across].addmm_(p_tu.T, x_tE)
            dscale += (d_tE * x_BE[span]).sum()
            torch.mul(d_tE, scale, out=dx_BE[span])
        del means  # as large as all texts, where captions are equal: `_take_matches` makes its own
        weight = grads[0] / (2 * len(x_BE))
        if dy_ME is not None:
            _take_matches(dy_ME, x_BE, 2 * scale, ctx.groups, own, ctx.tile)
            dy_ME *= weight
        return dx_BE.mul_(weight), dy_ME, dscale.mul_(weight), None, None, None


class _Means:
    """For spans of local rows, the mean text of the rows with the same caption, [t, E]."""

    def __init__(self, y_ME: Tensor, groups: Alike | None, own: slice) -> None:
        self._mine = None if groups is None else (groups.group_M[own], groups.share_M[own, None])
        # more than two equal captions are added up in any order on a GPU: the last digit may differ between runs
        self._y_BE = y_ME[own] if groups is None else torch.zeros_like(y_ME).index_add_(0, groups.group_M, y_ME)

    def __call__(self, span: slice) -> Tensor:
        if self._mine is None:
            return self._y_BE[span]
        group_B, share_B1 = self._mine
        return self._y_BE[group_B[span]] * share_B1[span]


def _take_matches(dy_ME: Tensor, x_BE: Tensor, weight: Tensor, groups: Alike | None, own: slice, tile: int) -> None:
    """Subtract from each text's gradient `weight` times the mean of its pictures, as far as they are on this rank."""
    if groups is None:
        for span, rows_tE in zip(tiles.spans(len(x_BE), tile), dy_ME[own].split(tile)):
            rows_tE -= x_BE[span] * weight
        return
    sums_ME = torch.zeros_like(dy_ME).index_add_(0, groups.group_M[own], x_BE)
    for span in tiles.spans(len(dy_ME), tile):
        dy_ME[span] -= sums_ME[groups.group_M[span]] * (groups.share_M[span, None] * weight)


def contrastive(
    image_BE: Tensor, text_BE: Tensor, *, scale: Tensor, same_B: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """Return this rank's symmetric contrastive loss, a scalar whose mean over ranks is the global loss.

    Gradients flow to the rows of all ranks, so the mean over ranks of the gradients is the gradient of the whole batch
    on one device, exactly. All ranks must hold equally many rows and weigh the loss alike.

    Args:
        image_BE: unit-norm image features of the local rows. Half precision is computed in single.
        text_BE: unit-norm text features of the same rows.
        scale: exp(logit_scale), [1].
        same_B: int64, equal where two rows are positives of each other; None: only the pair itself.
        tile: rows and columns of logits held at once; None: what suits the device.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        image_BE, text_ME = tiles.full(image_BE), dist.gather_with_grad(tiles.full(text_BE))
        groups = None if same_B is None else alike(dist.gather(same_B), image_BE.dtype)
        first, size = dist.rank() * len(image_BE), tile or tiles.side(image_BE.device)
        loss: Tensor = _BothDirections.apply(image_BE, text_ME, scale.to(image_BE), groups, first, size)
    return loss

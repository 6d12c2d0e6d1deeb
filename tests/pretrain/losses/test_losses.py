"""Contrastive and sigmoid loss on W ranks equal one process with the whole batch, and open_clip's losses."""

from collections.abc import Callable

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist
from pretrain.losses.contrastive import contrastive
from pretrain.losses.sigmoid import sigmoid

ROWS, WIDTH = 24, 16  # rows are divisible by 1, 2, 3 and 4


def parts(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return the parameters (two towers, log temperature, bias), inputs of both sides and captions that repeat."""
    draw = torch.Generator().manual_seed(0)
    towers = [torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.double).to(dtype) for _ in range(2)]
    scalars = [torch.tensor([2.0], dtype=dtype), torch.tensor([-3.0], dtype=dtype)]
    inputs = [torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.double).to(dtype) for _ in range(2)]
    same = torch.arange(ROWS) % 19  # five captions occur twice, on different ranks
    return [p.requires_grad_() for p in (*towers, *scalars)], inputs[0], inputs[1], same


def step(kind: str, repeated: bool, dtype: torch.dtype, tile: int) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients as DeepSpeed would average them over ranks."""
    params, image_NC, text_NC, same_N = parts(dtype)
    rows = slice(dist.rank() * ROWS // dist.world(), (dist.rank() + 1) * ROWS // dist.world())
    image_BE = F.normalize(image_NC[rows] @ params[0], dim=1)
    text_BE = F.normalize(text_NC[rows] @ params[1], dim=1)
    same_B = same_N[rows] if repeated else None
    if kind == "contrastive":
        loss = contrastive(image_BE, text_BE, scale=params[2].exp(), same_B=same_B, tile=tile)
    else:
        loss = sigmoid(image_BE, text_BE, scale=params[2].exp(), bias=params[3], same_B=same_B, tile=tile)
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return dist.mean(loss), [dist.mean(g) for g in grads if g is not None]


def reference(kind: str, repeated: bool) -> tuple[Tensor, list[Tensor]]:
    """Return loss and gradients of the whole batch from full matrices, in float64."""
    params, image_NC, text_NC, same_N = parts(torch.double)
    image_NE = F.normalize(image_NC @ params[0], dim=1)
    text_NE = F.normalize(text_NC @ params[1], dim=1)
    logits_NN = params[2].exp() * image_NE @ text_NE.T
    equal_NN = (same_N[:, None] == same_N).double() if repeated else torch.eye(ROWS, dtype=torch.double)
    if kind == "contrastive":
        target_NN = equal_NN / equal_NN.sum(1, keepdim=True)
        rows = F.cross_entropy(logits_NN, target_NN)
        loss = (rows + F.cross_entropy(logits_NN.T, target_NN)) / 2
    else:
        loss = -F.logsigmoid((2 * equal_NN - 1) * (logits_NN + params[3])).sum() / ROWS
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return loss.detach(), [g for g in grads if g is not None]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("kind", ["contrastive", "sigmoid"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_equal_the_whole_batch(ranks, world: int, kind: str, repeated: bool) -> None:
    loss, grads = reference(kind, repeated)
    for dtype, bound in ((torch.double, 1e-12), (torch.float32, 1e-6)):
        for theirs, their_grads in ranks.run(world, step, kind, repeated, dtype, tile=5):
            # the bound holds for values of order one: the loss is about 3, SigLIP's about 10
            assert abs(theirs.double() - loss) <= bound * max(1.0, float(loss))
            for ours, full in zip(their_grads, grads, strict=True):
                assert (ours.double() - full).abs().max() <= bound * max(1.0, float(full.abs().max()))


@pytest.mark.parametrize("tile", [1, 7, 24, 1000])
@pytest.mark.parametrize(
    ("kind", "theirs"), [("contrastive", lambda x, y, s, b: ClipLoss()(x, y, s)), ("sigmoid", SigLipLoss())]
)
def test_equal_to_open_clip(kind: str, theirs: Callable, tile: int) -> None:
    params, image_NC, text_NC, _ = parts(torch.double)
    loss, grads = step(kind, False, torch.double, tile)
    image_NE = F.normalize(image_NC @ params[0], dim=1)
    text_NE = F.normalize(text_NC @ params[1], dim=1)
    expected = theirs(image_NE, text_NE, params[2].exp(), params[3])
    expected_grads = [g for g in torch.autograd.grad(expected, params, allow_unused=True) if g is not None]
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    for ours, full in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, full, rtol=0, atol=1e-12)


def test_known_values() -> None:
    """Identical embeddings cost ln N; orthogonal ones under SigLIP's start softplus(10) + 63 softplus(-10)."""
    ones = F.normalize(torch.ones(64, 64), dim=1)
    assert contrastive(ones, ones, scale=torch.tensor([14.3])).item() == pytest.approx(4.158883, abs=1e-5)
    apart = torch.zeros(64, 64)
    value = sigmoid(apart, apart, scale=torch.tensor([10.0]), bias=torch.tensor([-10.0]))
    assert value.item() == pytest.approx(10.002906, abs=1e-5)


def test_no_square_matrix_is_kept() -> None:
    """What autograd holds between forward and backward grows with N, not with N * N."""
    rows = 4096
    features = F.normalize(torch.randn(rows, 8), dim=1).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        contrastive(features, features.detach(), scale=torch.tensor([10.0]), tile=64)
        sigmoid(features, features.detach(), scale=torch.tensor([10.0]), bias=torch.zeros(1), tile=64)
    assert max(kept) <= rows * 8


def test_pairs_may_be_permuted_and_sides_swapped() -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = (F.normalize(torch.randn(12, 8, generator=draw), dim=1) for _ in range(2))
    order = torch.randperm(12, generator=draw)
    scale = torch.tensor([5.0])
    loss = contrastive(x, y, scale=scale)
    torch.testing.assert_close(contrastive(x[order], y[order], scale=scale), loss)
    torch.testing.assert_close(contrastive(y, x, scale=scale), loss)

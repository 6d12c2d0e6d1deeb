"""Contrastive and sigmoid loss on W ranks equal one process with the whole batch, and open_clip's losses."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist, registry
from pretrain.config import ConfigError, build
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
        contrastive(features, features.detach(), scale=torch.tensor([10.0]), tile=512)
        sigmoid(features, features.detach(), scale=torch.tensor([10.0]), bias=torch.zeros(1), tile=512)
    assert max(kept) <= rows * 8


def test_no_square_matrix_is_made() -> None:
    """Neither pass of either loss makes a tensor larger than the features and a tile."""
    x = F.normalize(torch.randn(512, 8), dim=1).requires_grad_()
    same, scale = torch.arange(512) // 2, torch.tensor([10.0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        for kind in (None, same):
            contrastive(x, x, scale=scale, same_B=kind, tile=64).backward()
            sigmoid(x, x, scale=scale, bias=torch.zeros(1), same_B=kind, tile=64).backward()
    shapes = [shape for event in seen.events() for shape in event.input_shapes if shape]
    assert max(map(math.prod, shapes)) <= max(512 * 8, 2 * 64 * 64)


def test_pairs_may_be_permuted_and_sides_swapped() -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = (F.normalize(torch.randn(12, 8, generator=draw), dim=1) for _ in range(2))
    order = torch.randperm(12, generator=draw)
    scale = torch.tensor([5.0])
    loss = contrastive(x, y, scale=scale)
    torch.testing.assert_close(contrastive(x[order], y[order], scale=scale), loss)
    torch.testing.assert_close(contrastive(y, x, scale=scale), loss)


def test_logits_of_any_size() -> None:
    """At CLIP's largest temperature a tile holds logits of -100 and 100: one maximum for all of it would lose rows."""
    draw = torch.Generator().manual_seed(2)
    x = F.normalize(torch.randn(40, 4, generator=draw), dim=1)
    y = F.normalize(x + 0.1 * torch.randn(40, 4, generator=draw), dim=1) * torch.ones(40, 1).index_fill_(
        0, torch.arange(20), -1.0
    )
    single = [t.clone().requires_grad_() for t in (x, y, torch.tensor([100.0]))]
    double = [t.double().requires_grad_() for t in (x, y, torch.tensor([100.0]))]
    loss = contrastive(single[0], single[1], scale=single[2], tile=16)
    expected = ClipLoss()(*double)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = zip(torch.autograd.grad(loss, single), torch.autograd.grad(expected, double))
    for ours, full in pairs:
        assert (ours.double() - full).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("repeated", [False, True])
def test_a_side_that_does_not_train(repeated: bool) -> None:
    """LiT: a locked tower's features need no gradient; that of the other side is the same."""
    params, image_NC, text_NC, same_N = parts(torch.double)
    x, y = F.normalize(image_NC, dim=1).requires_grad_(), F.normalize(text_NC, dim=1).requires_grad_()
    same_B = same_N if repeated else None
    scale = params[2].exp().detach()
    full = torch.autograd.grad(contrastive(x, y, scale=scale, same_B=same_B, tile=5), (x, y))
    [left] = torch.autograd.grad(contrastive(x, y.detach(), scale=scale, same_B=same_B, tile=5), (x,))
    [right] = torch.autograd.grad(contrastive(x.detach(), y, scale=scale, same_B=same_B, tile=5), (y,))
    assert torch.equal(left, full[0]) and torch.equal(right, full[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_in_single(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    x, y = (F.normalize(torch.randn(12, 8, generator=draw), dim=1).to(dtype).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor([9.0]), torch.zeros(1)
    for loss in (lambda x, y: contrastive(x, y, scale=scale), lambda x, y: sigmoid(x, y, scale=scale, bias=bias)):
        half, single = loss(x, y), loss(x.float(), y.float())
        assert half.dtype == torch.float32 and torch.equal(half, single)
        assert torch.autograd.grad(half, x)[0].dtype == dtype


def test_what_is_gathered_is_no_option() -> None:
    """open_clip's local loss without gather-with-grad points the wrong way: no call and no config asks for it."""
    assert set(inspect.signature(contrastive).parameters) == {"image_BE", "text_BE", "scale", "same_B", "tile"}
    assert set(inspect.signature(sigmoid).parameters) == {"image_BE", "text_BE", "scale", "bias", "same_B", "tile"}
    for name in ("contrastive", "sigmoid"):
        with pytest.raises(ConfigError, match="local_loss"):
            build(registry.find("pretrain.objectives", name).Config, {"local_loss": True}, where=name)

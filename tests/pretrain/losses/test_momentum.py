"""Loss against keys: on W ranks it is one process with full matrices, gradients included, and no square is made."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist
from pretrain.losses.momentum import towards_keys

ROWS, OLDER, WIDTH = 24, 17, 16  # rows are divisible by 1, 2 and 3


def parts(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the parameters (a tower, log temperature), and what is compared: five captions occur twice, one thrice."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.double).to(dtype)

    params = [normal(WIDTH, WIDTH).requires_grad_(), torch.tensor([2.0], dtype=dtype).requires_grad_()]
    given = {
        "x": normal(ROWS, WIDTH),
        "own": F.normalize(normal(ROWS, WIDTH), dim=1),
        "key": F.normalize(normal(ROWS, WIDTH), dim=1),
        "older": F.normalize(normal(OLDER, WIDTH), dim=1),
        "same": torch.cat([torch.arange(ROWS) % 19, torch.arange(OLDER) + 17]),
        "absent": torch.arange(ROWS + OLDER) >= ROWS + OLDER - 4,
    }
    return params, given


def step(alpha: float, kind: str, dtype: torch.dtype, tile: int) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients as DeepSpeed would average them over ranks."""
    params, given = parts(dtype)
    rows = slice(dist.rank() * ROWS // dist.world(), (dist.rank() + 1) * ROWS // dist.world())
    queue = kind == "queue"
    keys_KE = dist.gather(given["key"][rows])
    loss = towards_keys(
        F.normalize(given["x"][rows] @ params[0], dim=1),
        given["own"][rows],
        torch.cat([keys_KE, given["older"]]) if queue else keys_KE,
        scale=params[1].exp(),
        alpha=alpha,
        same_K=None if kind == "pairs" else given["same"] if queue else given["same"][:ROWS],
        absent_K=given["absent"] if queue else None,
        tile=tile,
    )
    return dist.mean(loss), [dist.mean(g) for g in torch.autograd.grad(loss, params)]


def reference(alpha: float, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Return loss and gradients of the whole batch from full matrices, as the paper writes them, in float64."""
    params, given = parts(torch.double)
    keys_KE, same_K = given["key"], given["same"][:ROWS]
    if kind == "queue":  # without the places that hold nothing
        keys_KE, same_K = torch.cat([keys_KE, given["older"]])[:-4], given["same"][:-4]
    x_NE, scale = F.normalize(given["x"] @ params[0], dim=1), params[1].exp()
    hard_NK = (same_K[:ROWS, None] == same_K).double() if kind != "pairs" else torch.eye(ROWS).double()
    soft_NK = (scale.detach() * given["own"] @ keys_KE.T).softmax(1)
    target_NK = (1 - alpha) * hard_NK / hard_NK.sum(1, keepdim=True) + alpha * soft_NK
    loss = F.cross_entropy(scale * x_NE @ keys_KE.T, target_NK)
    return loss.detach(), list(torch.autograd.grad(loss, params))


@pytest.mark.parametrize("kind", ["pairs", "captions", "queue"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_equal_the_whole_batch(ranks, world: int, kind: str) -> None:
    for alpha in (0.0, 0.4, 1.0):
        loss, grads = reference(alpha, kind)
        for dtype, bound in ((torch.double, 1e-12), (torch.float32, 2e-6)):
            for theirs, their_grads in ranks.run(world, step, alpha, kind, dtype, tile=5):
                assert abs(theirs.double() - loss) <= bound * max(1.0, float(loss))
                for ours, full in zip(their_grads, grads, strict=True):
                    assert (ours.double() - full).abs().max() <= bound * max(1.0, float(full.abs().max()))


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_tiles_of_any_size(tile: int) -> None:
    loss, grads = reference(0.4, "queue")
    found, found_grads = step(0.4, "queue", torch.double, tile)
    for ours, full in zip([found, *found_grads], [loss, *grads], strict=True):
        torch.testing.assert_close(ours, full, rtol=0, atol=1e-12)


def test_logits_of_any_size() -> None:
    """At CLIP's largest temperature, logits from -100 to 100 come in tile after tile."""
    draw = torch.Generator().manual_seed(2)
    keys = F.normalize(torch.randn(40, 4, generator=draw), dim=1)
    x = F.normalize(keys + 0.1 * torch.randn(40, 4, generator=draw), dim=1)
    x[:20] *= -1
    scale = torch.tensor([100.0])
    losses = {}
    for dtype in (torch.float32, torch.double):
        one = [t.to(dtype) for t in (x, keys, keys)]
        losses[dtype] = towards_keys(*one, scale=scale.to(dtype), alpha=0.4, tile=16).item()
    assert losses[torch.float32] == pytest.approx(losses[torch.double], rel=1e-6)


def test_nothing_flows_to_keys_and_targets() -> None:
    draw = torch.Generator().manual_seed(3)
    x, own, keys = (F.normalize(torch.randn(6, 4, generator=draw), dim=1).requires_grad_() for _ in range(3))
    found = torch.autograd.grad(
        towards_keys(x, own, keys, scale=torch.ones(1), alpha=0.4), (x, own, keys), allow_unused=True
    )
    assert found[0].abs().max() > 0 and found[1] is None and found[2] is None


def test_no_square_matrix_is_made() -> None:
    """Neither pass makes a tensor larger than the keys and a tile, and backward gets features alone."""
    x, keys = (F.normalize(torch.randn(n, 8), dim=1) for n in (512, 768))
    x.requires_grad_()
    kept: list[int] = []
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        same, absent = torch.arange(768) // 2, torch.arange(768) > 700
        loss = towards_keys(
            x, x.detach(), keys, scale=torch.tensor([10.0]), alpha=0.4, same_K=same, absent_K=absent, tile=64
        )
        loss.backward()
    shapes = [shape for event in seen.events() for shape in event.input_shapes if shape]
    assert max(map(math.prod, shapes)) <= max(768 * 8, 2 * 64 * 64)
    assert max(kept) <= 512 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_in_single(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    x, own, keys = (F.normalize(torch.randn(12, 8, generator=draw), dim=1).to(dtype) for _ in range(3))
    half = towards_keys(x.requires_grad_(), own, keys, scale=torch.tensor([9.0]), alpha=0.4)
    single = towards_keys(x.float(), own.float(), keys.float(), scale=torch.tensor([9.0]), alpha=0.4)
    assert half.dtype == torch.float32 and torch.equal(half, single)
    assert torch.autograd.grad(half, x)[0].dtype == dtype

"""Rank, world, collectives with gradient, agreement and seeds. Works with one process and no process group."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

# torch 2.14 renames the collective and warns about the old name, older releases know only that one
_all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor

#: called at the start of an exchange of tensors between ranks, in a step's forward above all; see engine/stragglers.py
ON_EXCHANGE: Callable[[], None] | None = None


def meet() -> None:
    """Tell who listens that an exchange between ranks begins."""
    if ON_EXCHANGE is not None:
        ON_EXCHANGE()


def active() -> bool:
    """Return whether a process group exists."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return torch_dist.get_rank() if active() else 0


def world() -> int:
    """Return the number of ranks, 1 without a process group."""
    return torch_dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which prints and writes for all."""
    return rank() == 0


class _Gather(torch.autograd.Function):
    """All-gather whose backward is reduce-scatter: each rank's slot gets the sum of what all ranks want of it."""

    @staticmethod
    def forward(ctx: Any, local_BE: Tensor) -> Tensor:
        meet()
        out_ME = local_BE.new_empty((world() * len(local_BE), *local_BE.shape[1:]))
        _all_gather(out_ME, local_BE.contiguous())
        return out_ME

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_ME = grads[0].contiguous()
        # gloo has no reduce-scatter in older releases: sum everywhere, keep the own slice
        torch_dist.all_reduce(grad_ME)
        return grad_ME.chunk(world())[rank()].clone()


def gather_with_grad(local_BE: Tensor) -> Tensor:
    """Return the rows of all ranks, [world * B, ...], in rank order; gradients flow back to every rank.

    All ranks must hold the same number of rows.
    """
    return _Gather.apply(local_BE) if world() > 1 else local_BE  # type: ignore[no-any-return]


def gather(local_B: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, without gradient. Equal row counts on all ranks."""
    if world() == 1:
        return local_B
    meet()
    out_M = local_B.new_empty((world() * len(local_B), *local_B.shape[1:]))
    _all_gather(out_M, local_B.contiguous())
    return out_M


def gather_objects(value: Any) -> list[Any]:
    """Return `value` of every rank, in rank order (pickles between our own processes: small and rare)."""
    if world() == 1:
        return [value]
    out: list[Any] = [None] * world()
    torch_dist.all_gather_object(out, value)
    return out


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    if world() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over ranks (not in place, no gradient)."""
    return total(value) / world()


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks (not in place, no gradient)."""
    out = value.detach().clone()
    if world() > 1:
        meet()
        torch_dist.all_reduce(out)
    return out


def logsumexp(value: Tensor) -> Tensor:
    """Return log(sum over ranks of exp(value)), elementwise (not in place, no gradient)."""
    if world() == 1:
        return value
    top = value.detach().clone()
    torch_dist.all_reduce(top, op=torch_dist.ReduceOp.MAX)
    return total((value - top).exp_()).log_().add_(top)


def any_rank(flag: bool, *, device: torch.device | str = "cpu") -> bool:  # noqa: FBT001 (the value itself)
    """Return whether `flag` is true on any rank: how ranks agree to stop or save."""
    if world() == 1:
        return flag
    word = torch.tensor([float(flag)], device=device)
    torch_dist.all_reduce(word, op=torch_dist.ReduceOp.MAX)
    return bool(word.item() > 0)


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        torch_dist.barrier()


def hash64(*parts: Any) -> int:
    """Return a non-negative 63-bit hash of the parts: the one source of randomness (equal on every machine)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(*parts: Any) -> None:
    """Seed torch's generators for a step, so that what a step draws does not depend on how it was reached."""
    torch.manual_seed(hash64(*parts))

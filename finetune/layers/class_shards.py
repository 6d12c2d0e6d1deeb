"""Classes shared among the ranks: each encodes its part of the prompts, all get all features, with gradient.

A text tower that trains, or that gradients run through, keeps the activations of every class's prompt: so a rank has
those of K / world classes. Each rank's slice gets the gradients that all ranks' losses have for it, and the mean over
ranks, which the engine takes, is that of ranks that encode everything.
Shapes: K = classes, k = classes of this rank, E = joint width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain import dist


def over_ranks(encode: Callable[[Tensor], Tensor], classes: int) -> Tensor:
    """Return the features of all classes, [K, E], on every rank. All ranks call it.

    `encode` takes class numbers [k], as many on every rank, and returns their features [k, E].
    """
    if dist.world() == 1 or classes < dist.world():
        return encode(torch.arange(classes))
    share = -(-classes // dist.world())
    own_k = (dist.rank() * share + torch.arange(share)).clamp(max=classes - 1)  # what is too much at the end is cut off
    return dist.gather_with_grad(encode(own_k))[:classes]

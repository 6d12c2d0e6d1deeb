"""Numbers drawn from a sample's hash: what is random on the device depends on no rank, micro-batch or generator.

`Batch.draw_B` is a hash of (seed, epoch, shard, key): a sample draws anew in each epoch, and the same however the batch
is split, replayed or resumed.

Shapes: B = rows (or images), P = numbers of each; int64 arithmetic wraps, on every device alike.
"""

import torch
from torch import Tensor

from pretrain.dist import hash64

GOLDEN = -7046029254386353131  #: 2**64 / golden ratio, as a signed number: the step of splitmix64


def scores(draw_B: Tensor, count: int) -> Tensor:
    """Return int64 [B, P]: a hash of (sample, place), splitmix64's finaliser (Steele et al. 2014)."""
    x_BP = draw_B[:, None] + GOLDEN * torch.arange(1, count + 1, device=draw_B.device)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x_BP = (x_BP ^ _right(x_BP, shift)) * factor
    return x_BP ^ _right(x_BP, 31)


def uniform(draw_B: Tensor, count: int, purpose: str) -> Tensor:
    """Return float64 [B, P] in [0, 1); draws for different purposes have nothing to do with each other."""
    return _right(scores(draw_B ^ hash64("draw", purpose), count), 11).double() * 2.0**-53


def _right(x: Tensor, shift: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)

"""Patch dropout: train on a random part of each picture's patches (FLIP, Li et al. 2023, arXiv:2212.00794).

timm's own layer draws from the global generator, so that its draws depend on ranks and micro-batches. Here the patches
are a function of the sample's hash, which is one of (seed, epoch, shard, key): a picture loses other patches in each
epoch, and the same however the batch is split, replayed or resumed.

Shapes: N = images, P = patches, K = kept patches, C = width.
"""

import torch
from torch import Tensor, nn

from pretrain.draws import scores


class PatchDropout(nn.Module):
    """Keeps a share of the patches in training and all of them in evaluation; stands where timm's layer stands."""

    def __init__(self, rate: float, *, prefix_tokens: int) -> None:
        super().__init__()
        self.rate, self.prefix_tokens = rate, prefix_tokens
        self.draw_N: Tensor | None = None  #: set by the tower for the pass that follows

    def forward(self, x_NPC: Tensor) -> Tensor:
        """Return [N, prefix + K, C]: class tokens first, then max(1, floor(P * (1 - rate))) patches in their order."""
        if not self.training:
            return x_NPC
        assert self.draw_N is not None and len(self.draw_N) == len(x_NPC), "patch dropout needs Batch.draw_B"
        prefix_NXC, patches_NPC = x_NPC[:, : self.prefix_tokens], x_NPC[:, self.prefix_tokens :]
        count = patches_NPC.shape[1]
        keep = max(1, int(count * (1 - self.rate)))
        kept_NK = scores(self.draw_N, count).argsort(1)[:, :keep].sort(1).values
        kept_NKC = patches_NPC.gather(1, kept_NK[..., None].expand(-1, -1, x_NPC.shape[-1]))
        return torch.cat([prefix_NXC, kept_NKC], 1)

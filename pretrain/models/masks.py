"""The masks of one stream [image | text], a mode for each row: bidirectional, causal, prefix, and what is between them.

All are block masks (models/attention.py) but for one thing: in the modes that are for text or for pictures alone, text
does not read the picture. The text of a fusion encoder, which reads pictures by cross-attention, has the same text
block. Nothing here adds masks: booleans are joined by `and`, and what is padded still sees itself, so that no row of a
softmax is empty.

    mode         image reads text   text reads image   text reads text
    BI           no                 yes                all
    FULL         yes                yes                all
    CAUSAL       no                 yes                k <= q
    PREFIX       no                 yes                k <= q, or k in the prefix
    PREFIX_FULL  the prefix         yes                as PREFIX
    TEXT_BI      no                 no                 all
    TEXT_CAUSAL  no                 no                 k <= q
    IMAGE        no                 no                 itself: text is of no interest

Image tokens must not read text that is predicted causally: what is to come would reach earlier words through them, two
layers up. BI, CAUSAL and PREFIX: Dong et al. 2019 (UniLM, arXiv:1905.03197), Liu et al. 2021 (UniVL, arXiv:2112.05587);
PREFIX_FULL: Wang et al. 2021 (SimVLM, arXiv:2108.10904).

Shapes: B = rows, I = image tokens, T = text tokens, L = I + T.
"""

from enum import IntEnum

import torch
from torch import Tensor

from pretrain.models.attention import mask_from_blocks


class Mode(IntEnum):
    """Which token of [image | text] reads which."""

    BI = 0
    FULL = 1
    CAUSAL = 2
    PREFIX = 3
    PREFIX_FULL = 4
    TEXT_BI = 5
    TEXT_CAUSAL = 6
    IMAGE = 7


def text_blocks(mode_B: Tensor, length: int, prefix_B: Tensor | None = None) -> Tensor:
    """Return the blocks of the text, int64 [B, T]; `prefix_B` says how many of its tokens are the prefix."""
    joined_B = torch.zeros_like(mode_B) if prefix_B is None else prefix_B
    joined_B = torch.where(_among(mode_B, Mode.PREFIX, Mode.PREFIX_FULL), joined_B, 0)
    joined_B = torch.where(_among(mode_B, Mode.BI, Mode.FULL, Mode.TEXT_BI), length, joined_B)
    return (torch.arange(length, device=mode_B.device) >= joined_B[:, None]).long()


def text_mask(mode_B: Tensor, length: int, *, prefix_B: Tensor | None = None, valid_BT: Tensor | None = None) -> Tensor:
    """Return bool [B, 1, T, T], True where a token of the text (dim 2) may read one (dim 3)."""
    mask_B1TT = mask_from_blocks(text_blocks(mode_B, length, prefix_B), valid_BT)
    return _itself_alone(mask_B1TT, _among(mode_B, Mode.IMAGE), 0)


def stream_blocks(blocks_BT: Tensor, images: int) -> Tensor:
    """Return the blocks of [image | text], int64 [B, L], where no image token reads text."""
    image_BI = blocks_BT.new_zeros(len(blocks_BT), images)
    return torch.cat([image_BI, torch.ones_like(blocks_BT[:, :1]), blocks_BT[:, 1:]], 1)


def stream_mask(
    mode_B: Tensor,
    images: int,
    length: int,
    *,
    prefix_B: Tensor | None = None,
    text_valid_BT: Tensor | None = None,
    image_valid_BI: Tensor | None = None,
) -> Tensor:
    """Return bool [B, 1, L, L], True where a token of [image | text] (dim 2) may read one (dim 3)."""
    blocks_BT = text_blocks(mode_B, length, prefix_B)
    apart_BL = stream_blocks(blocks_BT, images)
    mixed_BL = torch.cat([apart_BL[:, :images], blocks_BT], 1)
    blocks_BL = torch.where(_among(mode_B, Mode.FULL, Mode.PREFIX_FULL)[:, None], mixed_BL, apart_BL)
    parts = ((image_valid_BI, images), (text_valid_BT, length))
    valid_BL = torch.cat([mode_B.new_ones(len(mode_B), n).bool() if v is None else v for v, n in parts], 1)
    mask_B1LL = mask_from_blocks(blocks_BL, valid_BL)
    blind_B = _among(mode_B, Mode.TEXT_BI, Mode.TEXT_CAUSAL, Mode.IMAGE)
    mask_B1LL[:, 0, images:, :images] &= ~blind_B[:, None, None]
    return _itself_alone(mask_B1LL, _among(mode_B, Mode.IMAGE), images)


def interleaved_blocks(image_BL: Tensor) -> Tensor:
    """Return the blocks of pictures and words in any order (SEGCAUSAL), int64 [B, L].

    The tokens of one picture read each other; all else is causal. Frozen's few-shot prompts for a stream that trains
    (Tsimpoukelli et al. 2021, arXiv:2106.13884).

    Args:
        image_BL: 0 for a word, n for the tokens of the n-th picture.
    """
    before_BL = torch.cat([torch.zeros_like(image_BL[:, :1]), image_BL[:, :-1]], 1)
    return ((image_BL == 0) | (image_BL != before_BL)).long()


def _among(mode_B: Tensor, *modes: Mode) -> Tensor:
    return torch.isin(mode_B, mode_B.new_tensor([int(mode) for mode in modes]))


def _itself_alone(mask_B1LL: Tensor, rows_B: Tensor, start: int) -> Tensor:
    """Return the mask with tokens from `start` on reading nothing but themselves, in these rows."""
    length = mask_B1LL.shape[-1]
    place_L = torch.arange(length, device=mask_B1LL.device)
    text_LL = (place_L[:, None] >= start) & (place_L[:, None] != place_L[None])
    return mask_B1LL & ~(rows_B[:, None, None, None] & text_LL)

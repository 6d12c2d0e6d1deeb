"""The fused half of a vision-language model: text states that read pictures, over the text tower.

    cross   transformer layers over text, each with cross-attention to the pictures' tokens between its self-attention
            and its mlp (Li et al. 2021, ALBEF, arXiv:2107.07651; Li et al. 2022, BLIP, arXiv:2201.12086)
    joint   transformer layers over one stream [image | text] (VLP, arXiv:1909.11059; BEiT-3, arXiv:2208.10442)

Both take a text's blocks and read pictures whole; no image token reads text, so that a picture's states are the same
whatever is asked of it.

Shapes: B = rows, T = tokens of text, S = tokens with those kept from earlier calls, C = width, N = images, P = patches,
R = image tokens that a row reads, L = R + S.
"""

from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field, StrictBool
from torch import Tensor, nn

from pretrain.config import Section
from pretrain.models import blocks, depth
from pretrain.models.attention import Attention, CrossAttention, Keep, Mlp, Sight, mask_from_blocks
from pretrain.models.attention import Block as PlainBlock
from pretrain.models.cache import Cache
from pretrain.models.depth import Depth
from pretrain.models.masks import stream_blocks


class Config(Section):
    """`model.fusion`: layers that read pictures, as wide as the text tower; heads, mlp and activation are its too."""

    kind: Literal["cross", "joint"] = "cross"
    layers: int = Field(default=6, gt=0)
    #: segment: tokens know whether they are given (read both ways) or written (causal), in joint also what is a picture
    mode_embedding: Literal["none", "segment"] | None = None  #: None: segment for joint, none for cross
    predict: Literal["next", "masked"] = "next"  #: what causal text says: the word after a place, or the one at a mask
    checkpointing: StrictBool | int = Field(default=False, ge=0)  #: recompute each block in backward, or one in so many

    @property
    def segments(self) -> bool:
        """Return whether there is a mode embedding."""
        return (self.mode_embedding or {"joint": "segment", "cross": "none"}[self.kind]) == "segment"


class Stream(NamedTuple):
    """A text and who reads whom in it; where keys are kept, all of the text, of which states are the last part."""

    blocks_BS: Tensor
    valid_BS: Tensor | None  #: bool, False on padding; None: all are there

    def mask(self, last: int) -> Tensor:
        """Return which token each of the last ones reads, [B, 1, T, S]."""
        return mask_from_blocks(self.blocks_BS, self.valid_BS)[:, :, -last:]

    def mask_beside(self, sight: Sight, last: int | None) -> Tensor:
        """Return the same of [image | text], [B, 1, L, L], or [B, 1, T, L] for the `last` tokens of the text."""
        blocks_BL = stream_blocks(self.blocks_BS, sight.valid_BR.shape[1])
        text_BS = torch.ones_like(self.blocks_BS, dtype=torch.bool) if self.valid_BS is None else self.valid_BS
        mask_B1LL = mask_from_blocks(blocks_BL, torch.cat([sight.valid_BR, text_BS], 1))
        return mask_B1LL if last is None else mask_B1LL[:, :, -last:]

    def segments(self, last: int) -> Tensor:
        """Return 0 for given and 1 for written tokens, [B, T]; the first is given: nothing predicts it."""
        segment_BS = torch.cat([torch.zeros_like(self.blocks_BS[:, :1]), self.blocks_BS[:, 1:]], 1)
        return segment_BS[:, -last:]


class Bridge(nn.Module):
    """Image tokens as the text's layers read them."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.linear.weight, std=width_in**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens_NPC: Tensor) -> Tensor:
        """Return [N, P, C of the text]."""
        return self.norm(self.linear(tokens_NPC))


class Block(nn.Module):
    """Pre-norm residual block: self-attention, cross-attention to pictures, mlp."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: float, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio, activation)

    def forward(
        self,
        x_BTC: Tensor,
        mask_B1TS: Tensor,
        sight: Sight,
        *,
        keep: Keep | None = None,
        seen: tuple[Tensor, Tensor] | None = None,
        keep_seen: Keep | None = None,
    ) -> Tensor:
        """Return [B, T, C]; `seen` and `keep_seen` are the cross-attention's keys and values, see there."""
        more = {} if keep is None else {"keep": keep}
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), mask_B1TS, **more)
        more = {} if keep is None else {"kept": seen, "keep": keep_seen}
        x_BTC = x_BTC + self.cross(self.norm_cross(x_BTC), sight, **more)
        return x_BTC + self.mlp(self.norm2(x_BTC))


class _Fusion(nn.Module):
    """What both kinds share."""

    def __init__(self, config: Config, *, width: int, heads: int, mlp_ratio: float, activation: str) -> None:
        super().__init__()
        self.config = config
        kinds = {"cross": (Block, 2), "joint": (PlainBlock, 3)}
        make, segments = kinds[config.kind]
        self.segment_embedding = nn.Embedding(segments, width) if config.segments else None
        self.blocks = nn.ModuleList(
            make(width, heads, mlp_ratio=mlp_ratio, activation=activation) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self._initialise(width)
        blocks.recompute(self, config.checkpointing, key="model.fusion.checkpointing")

    def _initialise(self, width: int) -> None:
        """Set the spreads of the text tower (models/text.py); what a block adds shrinks with their number."""
        thin = width**-0.5 * (2 * self.config.layers) ** -0.5
        if self.segment_embedding is not None:
            nn.init.normal_(self.segment_embedding.weight, std=0.02)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                last = name.rpartition(".")[2]
                spread = thin if last in ("out", "down") else (2 * width) ** -0.5 if last == "up" else width**-0.5
                nn.init.normal_(module.weight, std=spread)
                nn.init.zeros_(module.bias)

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter lies."""
        return depth.of_tower(self, self, "fusion")

    def _segmented(self, x_BTC: Tensor, segment_BT: Tensor) -> Tensor:
        return x_BTC if self.segment_embedding is None else x_BTC + self.segment_embedding(segment_BT)


class Cross(_Fusion):
    """Layers over text that read pictures by cross-attention."""

    def forward(self, text_BTC: Tensor, stream: Stream, sight: Sight, cache: Cache | None = None) -> Tensor:
        """Return states [B, T, C] of the tokens of a text, after the final norm."""
        length = text_BTC.shape[1]
        x_BTC = self._segmented(text_BTC, stream.segments(length))
        mask_B1TS = stream.mask(length)
        for number, block in enumerate(self.blocks):
            if cache is None:
                x_BTC = block(x_BTC, mask_B1TS, sight)
                continue
            own, seen = f"fusion.{number}", f"fusion.{number}.cross"
            x_BTC = block(
                x_BTC,
                mask_B1TS,
                sight,
                keep=partial(cache.grow, own),
                seen=cache.once(seen),
                keep_seen=partial(cache.keep, seen),
            )
        return self.norm(x_BTC)


class Joint(_Fusion):
    """Layers over [image | text]."""

    def forward(self, text_BTC: Tensor, stream: Stream, sight: Sight, cache: Cache | None = None) -> Tensor:
        """Return states [B, T, C] of the tokens of a text, after the final norm."""
        length = text_BTC.shape[1]
        x_BTC = self._segmented(text_BTC, stream.segments(length))
        fresh = length == stream.blocks_BS.shape[1]  # the pictures' keys are kept with those of the first tokens
        if fresh:
            image_BRC = sight.of_rows()
            image_BRC = self._segmented(image_BRC, torch.full_like(sight.valid_BR, 2, dtype=torch.long))
            x_BTC = torch.cat([image_BRC.to(x_BTC.dtype), x_BTC], 1)
        x_BTC = self.through(x_BTC, stream.mask_beside(sight, None if fresh else length), cache)
        return x_BTC[:, -length:]

    def through(self, x_BLC: Tensor, mask_B1LL: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the states of a whole stream under any mask, after the final norm."""
        for number, block in enumerate(self.blocks):
            if cache is None:
                x_BLC = block(x_BLC, mask_B1LL)
            else:
                x_BLC = block(x_BLC, mask_B1LL, keep=partial(cache.grow, f"fusion.{number}"))
        return self.norm(x_BLC)


def build(config: Config, *, width: int, heads: int, mlp_ratio: float, activation: str) -> Cross | Joint:
    """Return the layers that a config describes."""
    kind = {"cross": Cross, "joint": Joint}[config.kind]
    return kind(config, width=width, heads=heads, mlp_ratio=mlp_ratio, activation=activation)

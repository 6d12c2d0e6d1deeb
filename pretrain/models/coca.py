"""CoCa: a captioner whose lower half is a contrastive text tower (Yu et al. 2022, arXiv:2205.01917).

Everything is causal. A class token is appended last, so that under a causal mask it can pool the whole text; it reads
no padding. The lower text layers see text alone, the upper ones read pictures by cross-attention. Pictures are pooled
by attention: `queries` tokens for the upper layers, and of these one more for the feature that rows are compared by (a
cascade, as in the paper). Trained with `contrastive` and `captioning`, weights 1 and 2.

Not open_clip's weights: there the class token also reads from positions of padding in the released models.
Shapes: B = rows, T = tokens, S = tokens with those kept from earlier calls, C = width, E = joint embedding width,
N = images, P = patches, Q = queries.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.models import base, fused_vlm, vlm
from pretrain.models import fusion as fusions
from pretrain.models import text as text_towers
from pretrain.models import vision as vision_towers
from pretrain.models.attention import CrossAttention, Sight
from pretrain.models.cache import Cache


class Config(vlm.Config):
    """`model:` the towers; `text` is the lower half, `fusion` the upper one."""

    name: Literal["coca"] = "coca"
    fusion: fusions.Config = Field(default_factory=lambda: fusions.Config(layers=12))
    queries: int = Field(default=256, gt=0)  #: image tokens that the upper half reads
    pool_heads: int = Field(default=8, gt=0)

    @property
    def file(self) -> str:
        """Return where the model's class is."""
        return "coca"

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return nothing: no word is hidden."""
        return ()


class Pooler(nn.Module):
    """Learned queries that attend to image tokens."""

    def __init__(self, queries: int, width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.norm_queries = nn.LayerNorm(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, tokens_NPC: Tensor) -> Tensor:
        """Return [N, Q, C]."""
        images, patches, _ = tokens_NPC.shape
        index_N1 = torch.arange(images, device=tokens_NPC.device)[:, None]
        all_NP = torch.ones(images, patches, dtype=torch.bool, device=tokens_NPC.device)
        queries_NQC = self.norm_queries(self.queries).expand(images, -1, -1)
        return self.norm(self.attention(queries_NQC, Sight(self.norm_tokens(tokens_NPC), index_N1, all_NP)))


class CocaVision(vision_towers.VisionTower):
    """A timm trunk, pooled by attention; its tokens are the queries'."""

    def __init__(self, config: vision_towers.Config, embed_dim: int, *, queries: int, heads: int) -> None:
        super().__init__(config, embed_dim)
        self.pool_tokens = Pooler(queries, self.width, heads)
        self.pool_feature = Pooler(1, self.width, heads)

    def _pooled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        tokens_NQC = self.pool_tokens(self._tokens(features))
        return tokens_NQC, self.pool_feature(tokens_NQC)[:, 0]


class CocaText(text_towers.NativeText):
    """Causal text with a class token at its end, in whose embedding its position is contained."""

    def __init__(self, config: text_towers.Config, embed_dim: int, *, end: int, pad: int) -> None:
        super().__init__(config, embed_dim, end=end)
        self.pad = pad
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.class_embedding, std=0.01)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        embeds_BTC: Tensor | None = None,
        mask_B1TS: Tensor | None = None,
        places_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> text_towers.Output:
        """Return states [B, T, C] without the class token's, and its projection [B, E]; see NativeText."""
        x_BTC = self._placed(self.embed(tokens_BT) if embeds_BTC is None else embeds_BTC, places_BT)
        length = x_BTC.shape[1]
        class_B1C = self.class_embedding.expand(len(x_BTC), 1, -1).to(x_BTC.dtype)
        if cache is not None:  # what is written one by one has no end yet
            x_BTC = self._through(x_BTC, mask_B1TS, cache)
            return text_towers.Output(x_BTC, self.projection(x_BTC[:, -1]))
        x_BTC = self._through(torch.cat([x_BTC, class_B1C], 1), self._with_class(tokens_BT, mask_B1TS), None)
        return text_towers.Output(x_BTC[:, :length], self.projection(x_BTC[:, length]))

    def _with_class(self, tokens_BT: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """Return the mask [B, 1, T + 1, T + 1] in which the class token reads up to the end, and no other reads it."""
        rows, length = tokens_BT.shape
        if mask_B1TT is None:
            mask_B1TT = torch.ones(length, length, dtype=torch.bool, device=tokens_BT.device).tril()[None, None]
        end_B = (tokens_BT == self.end).int().argmax(1)
        read_BT = torch.arange(length, device=tokens_BT.device) <= end_B[:, None]
        mask_B1SS = torch.ones(rows, 1, length + 1, length + 1, dtype=torch.bool, device=tokens_BT.device)
        mask_B1SS[:, :, :length, :length] = mask_B1TT
        mask_B1SS[:, :, :length, length] = False
        mask_B1SS[:, 0, length, :length] = read_BT
        return mask_B1SS


class CoCa(fused_vlm.FusedVLM):
    """A contrastive captioner."""

    provides = ("image", "text", "fuse", "generate")
    prompt_block = 1  #: a prompt is causal too
    config: Config

    @staticmethod
    def _towers(config: Config, *, end: int, pad: int) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        vision = CocaVision(config.vision, config.embed_dim, queries=config.queries, heads=config.pool_heads)
        return vision, CocaText(config.text, config.embed_dim, end=end, pad=pad)

    def forward(self, batch: base.Batch) -> "CocaEncodings":
        """Return the lazily computed features of a batch."""
        return CocaEncodings(self, batch)


Model = CoCa


class CocaEncodings(fused_vlm.FusedEncodings):
    """What CoCa knows of a batch: the lower half serves both losses in one pass."""

    def fuse(
        self,
        tokens_BT: Tensor,
        blocks_BT: Tensor,
        image_B: Tensor | None = None,
        valid_BT: Tensor | None = None,
        *,
        text_B: Tensor | None = None,
    ) -> Tensor:
        """Return states [B, T, C] of causal texts that read pictures; see FusedEncodings."""
        if tokens_BT is not self.batch.tokens_BT or blocks_BT is not self.batch.blocks_BT:
            return super().fuse(tokens_BT, blocks_BT, image_B, valid_BT, text_B=text_B)
        stream = fusions.Stream(blocks_BT, valid_BT)
        return self.model.fused(self._text.tokens_BTC, stream, self.sight(image_B), text_B=text_B)

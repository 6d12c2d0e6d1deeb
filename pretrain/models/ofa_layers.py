"""OFA's transformer layers: pre-norm, with NormFormer's norms and head gains, under a bias of positions.

    x += drop_path(LN(attention(LN(x))))           in the decoder once more, over the memory
    x += drop_path(W2 LN(gelu(W1 LN(x))))

Wang et al. 2022 (arXiv:2202.03052); NormFormer, Shleifer et al. 2021 (arXiv:2110.09456). Names of parameters are those
of the released weights.

Shapes: B = rows, Q = queries, K = keys, S = states of the memory, U = tokens written, P = patches, T = source tokens,
C = width, H = heads, D = width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models import ofa_positions
from pretrain.models.cache import Cache

MASKED = -65504.0  #: a logit whose softmax is zero in every precision, and no infinity where a whole row is masked


class Shape(NamedTuple):
    """What all layers of both stacks share."""

    width: int
    hidden: int
    heads: int
    scale: float  #: the logits are divided by sqrt(scale * D)
    dropout: float
    attention_dropout: float


class Attention(nn.Module):
    """Multi-head attention with a bias, and one learned gain a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.attention_dropout
        self.scale = (shape.scale * shape.width / shape.heads) ** -0.5
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(shape.width, shape.width))
        self.c_attn = nn.Parameter(torch.ones(shape.heads))

    def keys(self, x_BKC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, K, D]."""
        return ofa_positions.heads_of(self.k_proj(x_BKC), self.heads), ofa_positions.heads_of(
            self.v_proj(x_BKC), self.heads
        )

    def forward(
        self,
        x_BQC: Tensor,
        memory_BKC: Tensor,
        bias_BHQK: Tensor,
        *,
        cache: Cache | None = None,
        grows: str = "",
        reads: str = "",
    ) -> Tensor:
        """Return [B, Q, C]. With a cache, keys are appended to those of `grows`, or computed once for `reads`."""
        if cache is None:
            k_BHKD, v_BHKD = self.keys(memory_BKC)
        elif grows:
            k_BHKD, v_BHKD = cache.grow(grows, *self.keys(memory_BKC))
        else:
            k_BHKD, v_BHKD = cache.once(reads) or cache.keep(reads, *self.keys(memory_BKC))
        q_BHQD = ofa_positions.heads_of(self.q_proj(x_BQC), self.heads)
        y_BHQD = F.scaled_dot_product_attention(
            q_BHQD,
            k_BHKD,
            v_BHKD,
            attn_mask=bias_BHQK.to(q_BHQD.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.out_proj((y_BHQD * self.c_attn[:, None, None]).transpose(1, 2).flatten(2))


class DropPath(nn.Module):
    """Leaves a branch out of a row's sum at random (stochastic depth, Huang et al. 2016, arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the branch, zero in a share of the rows, larger in the others; as dropout, it draws from the step."""
        if not self.rate or not self.training:
            return x_BTC
        keep_B11 = torch.rand(len(x_BTC), 1, 1, device=x_BTC.device) >= self.rate
        return x_BTC / (1 - self.rate) * keep_B11


class Layer(nn.Module):
    """What layers of both stacks have: self-attention is the subclass's, the feed-forward half stands here."""

    def __init__(self, shape: Shape, drop_path: float) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.self_attn_layer_norm = nn.LayerNorm(shape.width)
        self.fc1, self.fc2 = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)
        self.ffn_layernorm = nn.LayerNorm(shape.hidden)
        self.final_layer_norm = nn.LayerNorm(shape.width)
        self.dropout, self.drop_path = nn.Dropout(shape.dropout), DropPath(drop_path)

    def add(self, x_BTC: Tensor, branch_BTC: Tensor) -> Tensor:
        """Return the residual stream with a branch added."""
        return x_BTC + self.drop_path(self.dropout(branch_BTC))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        """Return the stream after the feed-forward half."""
        hidden = F.gelu(self.fc1(self.final_layer_norm(x_BTC)))
        return self.add(x_BTC, self.fc2(self.ffn_layernorm(hidden)))


class EncoderBias(NamedTuple):
    """What all layers of an encoder share of the bias: pictures first, then text."""

    absolute_BHSS: Tensor  #: the decoupled term, MASKED where nobody may look
    patches_BPP: Tensor  #: buckets
    tokens_1TT: Tensor

    def of(self, tables: tuple[nn.Embedding, nn.Embedding]) -> Tensor:
        """Return the bias [B, H, S, S] of a layer; between patches and tokens there is no relative term."""
        patches = self.patches_BPP.shape[1]
        out = self.absolute_BHSS.clone()
        out[:, :, :patches, :patches] += ofa_positions.bias(tables[1], self.patches_BPP)
        out[:, :, patches:, patches:] += ofa_positions.bias(tables[0], self.tokens_1TT)
        return out


class EncoderLayer(Layer):
    """Self-attention and feed-forward; the bias is made inside, so that recomputation need not keep it."""

    def __init__(self, shape: Shape, drop_path: float) -> None:
        super().__init__(shape, drop_path)
        self.attn_ln = nn.LayerNorm(shape.width)

    def forward(self, x_BSC: Tensor, shared: EncoderBias, tables: tuple[nn.Embedding, nn.Embedding]) -> Tensor:
        """Return [B, S, C]."""
        normed = self.self_attn_layer_norm(x_BSC)
        x_BSC = self.add(x_BSC, self.attn_ln(self.self_attn(normed, normed, shared.of(tables))))
        return self.feed_forward(x_BSC)


class DecoderBias(NamedTuple):
    """What all layers of a decoder share of the bias; of each row's two kinds of positions, one holds."""

    self_BHUK: Tensor
    cross_BHUS: Tensor
    tokens_1UK: Tensor  #: buckets
    codes_1UK: Tensor
    kind_B: Tensor  #: 1 where a row writes image codes, else 0

    def of(self, tables: tuple[nn.Embedding, nn.Embedding]) -> Tensor:
        """Return the bias [B, H, U, K] of a layer's self-attention."""
        both_2HUK = torch.cat(
            [ofa_positions.bias(tables[0], self.tokens_1UK), ofa_positions.bias(tables[1], self.codes_1UK)]
        )
        return self.self_BHUK + both_2HUK[self.kind_B]


class DecoderLayer(Layer):
    """Self-attention, attention to the memory, feed-forward."""

    def __init__(self, shape: Shape, drop_path: float) -> None:
        super().__init__(shape, drop_path)
        self.self_attn_ln, self.cross_attn_ln = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.encoder_attn, self.encoder_attn_layer_norm = Attention(shape), nn.LayerNorm(shape.width)

    def forward(
        self,
        x_BUC: Tensor,
        memory_BSC: Tensor,
        shared: DecoderBias,
        tables: tuple[nn.Embedding, nn.Embedding],
        cache: Cache | None = None,
        name: str = "",
    ) -> Tensor:
        """Return [B, U, C]; `name` is the layer's in the cache."""
        normed = self.self_attn_layer_norm(x_BUC)
        mine = self.self_attn(normed, normed, shared.of(tables), cache=cache, grows=f"{name}.self")
        x_BUC = self.add(x_BUC, self.self_attn_ln(mine))
        normed = self.encoder_attn_layer_norm(x_BUC)
        read = self.encoder_attn(normed, memory_BSC, shared.cross_BHUS, cache=cache, reads=f"{name}.memory")
        x_BUC = self.add(x_BUC, self.cross_attn_ln(read))
        return self.feed_forward(x_BUC)

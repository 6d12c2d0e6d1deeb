"""Attention under a block mask, and the pre-norm transformer block that every native tower is made of.

A mask is data: one int a token. 1 opens a new block, 0 joins the last; a query sees its own block and
the blocks before it. `1 1 1 1` is causal, `0 0 0 1 1` a prefix language model, `0 0 0 0` both ways.

Shapes: B = rows, T = tokens, C = width, H = heads, D = width of a head.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def mask_from_blocks(blocks_BT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """Return bool [B, 1, T, T], True where query (dim 2) may look at key (dim 3).

    `valid_BT` is False on padding: no query sees a padded key, save itself, so that no row is empty.
    """
    order_BT = blocks_BT.cumsum(1)
    mask_BTT = order_BT[:, :, None] >= order_BT[:, None, :]
    if valid_BT is not None:
        own_TT = mask_BTT.new_ones(mask_BTT.shape[-1]).diag()
        mask_BTT = mask_BTT & valid_BT[:, None, :] | own_TT
    return mask_BTT[:, None]


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v come from one linear (rows in that order)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        """Return [B, T, C]. Without a mask attention is causal: the towers' most common case, and SDPA's fastest."""
        rows, length, width = x_BTC.shape
        qkv_3BHTD = self.qkv(x_BTC).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD, v_BHTD = qkv_3BHTD.unbind(0)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_B1TT, is_causal=mask_B1TT is None
        )
        return self.out(y_BHTD.transpose(1, 2).reshape(rows, length, width))


class QuickGELU(nn.Module):
    """The activation of OpenAI's weights: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class Mlp(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, width: int, ratio: float, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, round(width * ratio))
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(round(width * ratio), width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return [B, T, C]."""
        return self.down(self.activation(self.up(x_BTC)))


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: float = 4.0, activation: str = "gelu") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio, activation)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        """Return [B, T, C]."""
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), mask_B1TT)
        return x_BTC + self.mlp(self.norm2(x_BTC))

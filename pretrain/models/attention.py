"""Attention under a block mask, and the pre-norm transformer block that every native tower is made of.

A mask is data: one int a token. 1 opens a new block, 0 joins the last; a query sees its own block and
the blocks before it. `1 1 1 1` is causal, `0 0 0 1 1` a prefix language model, `0 0 0 0` both ways.

Shapes: B = rows, T = tokens, C = width, H = heads, D = width of a head; in the cross-attention N = images, S = tokens
of an image, M = images that a row reads, R = M S. Where keys are kept (`keep`), T may be the last tokens only, and keys
are those of all.
"""

from collections.abc import Callable
from typing import NamedTuple

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


#: takes keys and values of new tokens, [B, H, T, D] each, and returns those of all tokens: a layer's share of a Cache
Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v come from one linear (rows in that order)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None, *, keep: Keep | None = None) -> Tensor:
        """Return [B, T, C]. Without a mask attention is causal: the towers' most common case, and SDPA's fastest.

        With `keep` the mask has the keys of all tokens in its last dimension.
        """
        rows, length, width = x_BTC.shape
        qkv_3BHTD = self.qkv(x_BTC).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD, v_BHTD = qkv_3BHTD.unbind(0)
        if keep is not None:
            assert mask_B1TT is not None, "a causal mask without its first rows is no triangle"
            k_BHTD, v_BHTD = keep(k_BHTD, v_BHTD)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_B1TT, is_causal=mask_B1TT is None
        )
        return self.out(y_BHTD.transpose(1, 2).reshape(rows, length, width))


class Sight(NamedTuple):
    """What rows read of pictures: tokens of all pictures, and which of these are whose."""

    states_NSC: Tensor
    index_BM: Tensor  #: int64, the pictures that a row reads
    valid_BR: Tensor  #: bool, False on tokens of a picture that is not there; its index is any

    def of_rows(self) -> Tensor:
        """Return the tokens that each row reads [B, R, C], what is not there included."""
        return self.states_NSC[self.index_BM].flatten(1, 2)


class CrossAttention(nn.Module):
    """Multi-head attention to pictures; keys and values of a picture are computed once, however many rows read it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BTC: Tensor, sight: Sight, *, kept: tuple[Tensor, Tensor] | None = None, keep: Keep | None = None
    ) -> Tensor:
        """Return [B, T, C], zero for rows that read no picture.

        Args:
            x_BTC: the states that ask.
            sight: what they read.
            kept: keys and values [B, H, R, D] of an earlier call with the same sight.
            keep: is given these, to keep them.
        """
        rows, length, width = x_BTC.shape
        q_BHTD = self.query(x_BTC).view(rows, length, self.heads, -1).transpose(1, 2)
        if kept is None:
            kept = self._keys(sight)
            kept = keep(*kept) if keep is not None else kept
        there_B1 = sight.valid_BR.any(1, keepdim=True)
        # a row without pictures reads what it must not, so that its softmax has a sum, and forgets it
        mask_B11R = (sight.valid_BR | ~there_B1)[:, None, None]
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, *kept, attn_mask=mask_B11R)
        y_BTC = self.out(y_BHTD.transpose(1, 2).reshape(rows, length, width))
        return y_BTC * there_B1[..., None].to(y_BTC.dtype)

    def _keys(self, sight: Sight) -> tuple[Tensor, Tensor]:
        images, length, _ = sight.states_NSC.shape
        kv_2NHSD = self.kv(sight.states_NSC).view(images, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        kv_2BMHSD = kv_2NHSD[:, sight.index_BM]
        k_BHRD, v_BHRD = kv_2BMHSD.transpose(2, 3).flatten(3, 4).unbind(0)
        return k_BHRD, v_BHRD


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

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None, *, keep: Keep | None = None) -> Tensor:
        """Return [B, T, C]."""
        # a module put in attention's place by sites.replace need not know of kept keys, as long as nothing is written
        more = {} if keep is None else {"keep": keep}
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), mask_B1TT, **more)
        return x_BTC + self.mlp(self.norm2(x_BTC))

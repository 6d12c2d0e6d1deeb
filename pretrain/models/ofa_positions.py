"""OFA's positions: absolute ones decoupled from content (TUPE), and relative ones by buckets of tokens and of pixels.

    logit_ij = q_i k_j / sqrt(2 D) + (LN(p_i) U_q)(LN(p_j) U_k) / sqrt(2 D) + b[bucket(i, j)]

Wang et al. 2022 (arXiv:2202.03052, section 3.1) after TUPE (Ke et al. 2021, arXiv:2006.15595). An image position is
row * side + column + 1 of a grid of `side` columns; 0 is the start that stands before a picture's codes.

Shapes: B = rows, Q = queries, K = keys, P = patches, C = width, H = heads, D = width of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FILLER = 1024  #: image position of what a decoder writes behind a picture's last code


def token_table(size: int, longest: int) -> list[int]:
    """Return the bucket of each distance 1 - longest .. longest - 1 between a query and a key: 2 * size - 1 of them.

    Distances up to size / 2 have one each, farther ones share them by their logarithm.
    """
    middle = size // 2
    buckets = []
    for distance in range(1 - longest, longest):
        far = abs(distance)
        if far > middle:
            share = math.log(far / middle) / math.log((longest - 1) / middle)
            far = math.ceil(share * (middle - 1)) + middle
        buckets.append(size - 1 + (far if distance > 0 else -far))
    return buckets


def image_buckets(query_BQ: Tensor, key_BK: Tensor, side: int) -> Tensor:
    """Return the bucket [B, Q, K] of each pair of image positions, of (2 side - 1)^2 + 3.

    The last three are the start seen from a patch... from the start to anything, from anything to it, and to itself.
    """
    span = 2 * side - 1
    query_BQ1, key_B1K = query_BQ[:, :, None], key_BK[:, None, :]
    rows = (query_BQ1 - 1).div(side, rounding_mode="floor") - (key_B1K - 1).div(side, rounding_mode="floor")
    columns = (query_BQ1 - 1) % side - (key_B1K - 1) % side
    found = (rows + side - 1) * span + columns + side - 1
    from_start, to_start = query_BQ1 == 0, key_B1K == 0
    found = torch.where(from_start, span**2, found)
    found = torch.where(to_start, span**2 + 1, found)
    return torch.where(from_start & to_start, span**2 + 2, found)


def grid_positions(rows: int, columns: int, side: int, device: torch.device | None = None) -> Tensor:
    """Return the image positions [rows * columns] of a grid, in raster order."""
    row_R1 = torch.arange(rows, device=device)[:, None]
    return (row_R1 * side + torch.arange(columns, device=device) + 1).flatten()


class Positions(nn.Module):
    """A stack's tables of positions: absolute ones of tokens and patches, relative ones of each layer."""

    def __init__(self, *, width: int, heads: int, layers: int, longest: int, bucket: int, side: int) -> None:
        super().__init__()
        self.side, self.longest = side, longest
        self.embed_positions = nn.Embedding(longest + 2, width)
        self.embed_image_positions = nn.Embedding(side**2 + 1, width)
        self.pos_ln, self.image_pos_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        tables = {"token": 2 * bucket - 1, "image": (2 * side - 1) ** 2 + 3}
        for kind, rows in tables.items():
            setattr(self, f"{kind}_rel_pos_table_list", nn.ModuleList(nn.Embedding(rows, heads) for _ in range(layers)))
        # of a distance, not of a pair: a pair's is looked up by arithmetic; not saved, it follows from the config
        self.register_buffer("bucket_of", torch.tensor(token_table(bucket, longest)), persistent=False)

    def tables(self, layer: int) -> tuple[nn.Embedding, nn.Embedding]:
        """Return a layer's relative tables, of tokens and of patches."""
        return self.token_rel_pos_table_list[layer], self.image_rel_pos_table_list[layer]  # type: ignore[return-value]

    def token_buckets(self, query_Q: Tensor, key_K: Tensor) -> Tensor:
        """Return the bucket [1, Q, K] of each pair of places in a text; farther than the table it is the last."""
        far = self.longest - 1
        distance_QK = (query_Q[:, None] - key_K[None, :]).clamp(-far, far)
        return self.bucket_of[distance_QK + far][None]

    def resized(self, rows: int, columns: int, known: int) -> Tensor:
        """Return positions [1, rows * columns, C] of a grid, stretched bilinearly from one of `known` x `known`."""
        table_KC = self.embed_image_positions(grid_positions(known, known, self.side, self.bucket_of.device))
        grid_1CHW = table_KC.view(1, known, known, -1).permute(0, 3, 1, 2)
        return F.interpolate(grid_1CHW, size=(rows, columns), mode="bilinear").flatten(2).transpose(1, 2)


def bias(table: nn.Embedding, buckets_BQK: Tensor) -> Tensor:
    """Return the relative term [B, H, Q, K] of a table."""
    return table(buckets_BQK).permute(0, 3, 1, 2)


def heads_of(x_BTC: Tensor, heads: int) -> Tensor:
    """Return [B, H, T, D]."""
    return x_BTC.view(*x_BTC.shape[:2], heads, -1).transpose(1, 2)

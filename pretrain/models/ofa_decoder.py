"""OFA's decoder: writes text, or the codes of a picture in raster order; which of the two is said row by row.

Both kinds of positions are computed for every batch and one is taken a row, so that all ranks run the same modules
whatever their rows write. Code places are 0 for the start, then the raster, then a filler.

Shapes: B = rows, U = tokens to be written, K = all tokens so far, S = states of the memory, C = width, H = heads,
D = width of a head; a leading 2 is (text, codes).
"""

import torch
from torch import Tensor, nn

from pretrain.models.cache import Cache
from pretrain.models.ofa_encoder import Encoded
from pretrain.models.ofa_layers import MASKED, DecoderBias, DecoderLayer, Shape
from pretrain.models.ofa_positions import FILLER, Positions, grid_positions, heads_of, image_buckets


class Decoder(nn.Module):
    """Embeddings, absolute positions of self- and cross-attention once, layers, a final norm."""

    def __init__(self, shape: Shape, positions: Positions, drop_paths: list[float], *, window: int) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.scale, self.window = shape.heads, (shape.scale * width / shape.heads) ** -0.5, window
        self.layernorm_embedding, self.code_layernorm_embedding = nn.LayerNorm(width), nn.LayerNorm(width)
        self.positions = positions
        for name in ("self_pos_q_linear", "self_pos_k_linear", "cross_pos_q_linear", "cross_pos_k_linear"):
            setattr(self, name, nn.Linear(width, width))
        self.layers = nn.ModuleList(DecoderLayer(shape, rate) for rate in drop_paths)
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(shape.dropout)

    def places(self, first: int, stop: int, device: torch.device) -> Tensor:
        """Return the image position of each token first .. stop - 1 of a row that writes codes."""
        raster = grid_positions(self.window, self.window, self.positions.side, device)
        filler = raster.new_full((max(0, stop - 1 - len(raster)),), min(FILLER, self.positions.side**2))
        return torch.cat([raster.new_zeros(1), raster, filler])[first:stop]

    def forward(
        self,
        words_BUC: Tensor,
        memory: Encoded,
        codes_B: Tensor,
        cache: Cache | None = None,
        *,
        entangled: bool = False,
    ) -> Tensor:
        """Return states [B, U, C] of embedded tokens, which follow those that the cache holds."""
        first = cache.length if cache is not None else 0
        kind_B = codes_B.long()
        place_2UC, normed_2UC = self._absolute(first, words_BUC)
        if entangled:
            words_BUC = words_BUC + place_2UC[kind_B]
        x_BUC = torch.where(
            codes_B[:, None, None], self.code_layernorm_embedding(words_BUC), self.layernorm_embedding(words_BUC)
        )
        x_BUC = self.dropout(x_BUC)
        shared = self._bias(normed_2UC, memory, kind_B, first, cache)
        for number, layer in enumerate(self.layers):
            x_BUC = layer(x_BUC, memory.states_BSC, shared, self.positions.tables(number), cache, str(number))
        return self.layer_norm(x_BUC)

    def _absolute(self, first: int, words_BUC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the absolute positions of the new tokens in both kinds, as they are and normalised."""
        table, stop = self.positions, first + words_BUC.shape[1]
        token_U = torch.arange(first, stop, device=words_BUC.device)
        token_UC = table.embed_positions(token_U)
        code_UC = table.embed_image_positions(self.places(first, stop, words_BUC.device))
        return torch.stack([token_UC, code_UC]), torch.stack([table.pos_ln(token_UC), table.image_pos_ln(code_UC)])

    def _bias(
        self, normed_2UC: Tensor, memory: Encoded, kind_B: Tensor, first: int, cache: Cache | None
    ) -> DecoderBias:
        table, stop = self.positions, first + normed_2UC.shape[1]
        device = normed_2UC.device

        def both(linear: nn.Module) -> Tensor:
            return heads_of(linear(normed_2UC), self.heads)[kind_B]

        key_BHKD = both(self.self_pos_k_linear)
        if cache is not None:
            key_BHKD, _ = cache.grow("positions", key_BHKD, key_BHKD[..., :0])
        kept = cache.once("memory positions") if cache is not None else None
        if kept is None:
            memory_BHSD = heads_of(self.cross_pos_k_linear(memory.positions_BSC), self.heads)
            kept = memory_BHSD, memory_BHSD[..., :0]
            if cache is not None:
                cache.keep("memory positions", *kept)
        memory_BHSD, _ = kept
        self_BHUK = (both(self.self_pos_q_linear) * self.scale) @ key_BHKD.transpose(2, 3)
        cross_BHUS = (both(self.cross_pos_q_linear) * self.scale) @ memory_BHSD.transpose(2, 3)
        all_K = torch.arange(stop, device=device)
        new_U = all_K[first:]
        code_1K = self.places(0, stop, device)[None]
        return DecoderBias(
            self_BHUK=torch.where(all_K <= new_U[:, None], self_BHUK, MASKED),
            cross_BHUS=torch.where(memory.valid_BS[:, None, None], cross_BHUS, MASKED),
            tokens_1UK=table.token_buckets(new_U, all_K),
            codes_1UK=image_buckets(code_1K[:, first:], code_1K, table.side),
            kind_B=kind_B,
        )

"""OFA's encoder: patches of a ResNet stem, then source tokens, in one pre-norm stack.

A row without a picture has patches of zeros that nobody reads; a rank without pictures runs its stem on a stand-in, so
that all ranks run the same modules. (The release runs its stem on a zero picture for each such row, which its batch
norms count.)

Shapes: B = rows, N = images, P = patches, T = source tokens, S = P + T, C = width, H = heads, D = width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.models.ofa_layers import MASKED, EncoderBias, EncoderLayer, Shape
from pretrain.models.ofa_positions import Positions, grid_positions, heads_of, image_buckets
from pretrain.models.patch_dropout import scores
from pretrain.models.resnet_stem import ResNetStem


class Encoded(NamedTuple):
    """What a decoder reads."""

    states_BSC: Tensor
    valid_BS: Tensor
    positions_BSC: Tensor  #: normalised absolute positions; one row where they are equal in all


class Pictures(NamedTuple):
    """The pictures of a batch; of one without, a stand-in that no row reads."""

    image_NCHW: Tensor  #: normalised
    owner_N: Tensor
    seen_B: Tensor  #: bool, the row has a picture
    any: bool


class Patches(NamedTuple):
    """A stem's grid as tokens, with the positions that travel with them."""

    x_BPC: Tensor
    ids_BP: Tensor  #: one row where all rows keep all patches
    positions_BPC: Tensor


class Encoder(nn.Module):
    """Embeddings, absolute positions once, layers, a final norm."""

    def __init__(self, shape: Shape, positions: Positions, stem: ResNetStem, drop_paths: list[float]) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.scale = shape.heads, (shape.scale * width / shape.heads) ** -0.5
        self.embed_images = stem
        self.image_proj = nn.Linear(stem.channels, width)
        self.type_embedding = nn.Embedding(2, width)
        self.layernorm_embedding, self.patch_layernorm_embedding = nn.LayerNorm(width), nn.LayerNorm(width)
        self.positions = positions
        self.pos_q_linear, self.pos_k_linear = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(EncoderLayer(shape, rate) for rate in drop_paths)
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        words_BTC: Tensor,
        valid_BT: Tensor,
        pictures: Pictures,
        *,
        draw_B: Tensor | None = None,
        keep: int | None = None,
        known: int | None = None,
        entangled: bool = False,
    ) -> Encoded:
        """Return the states of pictures and text.

        Args:
            words_BTC: embedded source tokens.
            valid_BT: False on padding.
            pictures: one a row at most.
            draw_B: each row's hash, which says what it keeps.
            keep: patches of each picture that training keeps; None: all.
            known: side of the grid whose positions are stretched over a larger one; None: never.
            entangled: absolute positions are added to the embeddings as well.
        """
        table = self.positions
        patches = self._patches(pictures, draw_B=draw_B, keep=keep, known=known)
        place_T = torch.arange(words_BTC.shape[1], device=words_BTC.device)
        place_1TC = table.embed_positions(place_T)[None]
        image_BPC, text_BTC = patches.x_BPC + self._type(1), words_BTC + self._type(0)
        if entangled:
            image_BPC, text_BTC = image_BPC + patches.positions_BPC, text_BTC + place_1TC
        image_BPC, text_BTC = self.patch_layernorm_embedding(image_BPC), self.layernorm_embedding(text_BTC)
        x_BSC = self.dropout(torch.cat([image_BPC, text_BTC], 1))
        valid_BS = torch.cat([pictures.seen_B[:, None].expand(image_BPC.shape[:2]), valid_BT], 1)

        seen = table.image_pos_ln(patches.positions_BPC)
        read = table.pos_ln(place_1TC).expand(len(seen), -1, -1)
        positions_BSC = torch.cat([seen, read], 1)
        q_BHSD = heads_of(self.pos_q_linear(positions_BSC), self.heads)
        k_BHSD = heads_of(self.pos_k_linear(positions_BSC), self.heads)
        absolute_BHSS = (q_BHSD * self.scale) @ k_BHSD.transpose(2, 3)
        shared = EncoderBias(
            absolute_BHSS=torch.where(valid_BS[:, None, None], absolute_BHSS, MASKED),
            patches_BPP=image_buckets(patches.ids_BP, patches.ids_BP, table.side),
            tokens_1TT=table.token_buckets(place_T, place_T),
        )
        for number, layer in enumerate(self.layers):
            x_BSC = layer(x_BSC, shared, table.tables(number))
        return Encoded(self.layer_norm(x_BSC), valid_BS, positions_BSC)

    def _type(self, kind: int) -> Tensor:
        return self.type_embedding(torch.tensor([kind], device=self.type_embedding.weight.device))

    def _patches(self, pictures: Pictures, *, draw_B: Tensor | None, keep: int | None, known: int | None) -> Patches:
        grid_NCHW = self.embed_images(pictures.image_NCHW, counted=pictures.any)
        rows, columns = grid_NCHW.shape[-2:]
        side = self.positions.side
        if max(rows, columns) > side:
            raise ConfigError(
                f"model.image_bucket: pictures of {rows * 16} x {columns * 16} pixels are {rows} x {columns} patches, "
                f"positions know {side} x {side}; prepare smaller pictures or raise it"
            )
        x_NPC = grid_NCHW.flatten(2).transpose(1, 2)
        x_BPC = x_NPC.new_zeros(len(pictures.seen_B), *x_NPC.shape[1:]).index_copy(0, pictures.owner_N, x_NPC)
        ids_1P = grid_positions(rows, columns, side, x_BPC.device)[None]
        stretched = known is not None and rows * columns > known**2
        positions_1PC = (
            self.positions.resized(rows, columns, int(known or 0))
            if stretched
            else self.positions.embed_image_positions(ids_1P)
        )
        if keep is None or keep >= rows * columns:
            return Patches(self.image_proj(x_BPC), ids_1P, positions_1PC)
        assert draw_B is not None and len(draw_B) == len(x_BPC), "sampled patches need Batch.draw_B"
        kept_BK = scores(draw_B, rows * columns).argsort(1)[:, :keep].sort(1).values
        x_BKC = x_BPC.gather(1, kept_BK[..., None].expand(-1, -1, x_BPC.shape[-1]))
        return Patches(self.image_proj(x_BKC), ids_1P[0][kept_BK], positions_1PC[0][kept_BK])

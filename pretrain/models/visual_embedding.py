"""VL-T5's visual embedding (arXiv:2102.02779, section 3.1): how a region looks, where it lies and which one it is.

    v = f(feature) + g(x0, y0, x1, y1, area) + E_image[picture] + E_region[region]

E_region are rows of the word table: region i is the sentinel <vis_extra_id_i>, so that the decoder can say it.
Shapes: B = rows, R = visual tokens of a row, F = numbers of a feature, C = width of the text model.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.models.t5 import Norm as RMSNorm
from pretrain.models.visual_tokens import IMAGES

Norm = Literal["each", "sum"]


class VisualEmbedding(nn.Module):
    """The sum above; names of weights are those of the released code."""

    def __init__(
        self, features: int, width: int, *, rms: bool, norm: Norm, area_mode: Literal["correct", "legacy"]
    ) -> None:
        super().__init__()
        self.area_mode = area_mode
        each = [RMSNorm(width) if rms else nn.LayerNorm(width) for _ in range(2 * (norm == "each"))]
        self.feat_embedding = nn.Sequential(nn.Linear(features, width), *each[:1])
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(5, width), *each[1:])
        self.img_order_embedding = nn.Embedding(IMAGES, width)
        self.layer_norm: nn.Module | None = None
        if norm == "sum":
            self.layer_norm = RMSNorm(width) if rms else nn.LayerNorm(width)

    def forward(self, feature_BRF: Tensor, box_BR4: Tensor, image_BR: Tensor, region_BRC: Tensor) -> Tensor:
        """Return visual tokens [B, R, C]; `region_BRC` are the rows of the word table."""
        dtype = region_BRC.dtype
        look_BRC = self.feat_embedding(feature_BRF.to(dtype))
        place_BRC = self.absolute_vis_pos_embedding(self.place(box_BR4.to(dtype)))
        x_BRC = look_BRC + place_BRC + self.img_order_embedding(image_BR) + region_BRC
        return x_BRC if self.layer_norm is None else self.layer_norm(x_BRC)

    def place(self, box_BR4: Tensor) -> Tensor:
        """Return boxes [B, R, 5] with their area; `legacy` is (y1 - x1) * (y0 - x0), as in released code."""
        x0, y0, x1, y1 = box_BR4.unbind(-1)
        area_BR = (x1 - x0) * (y1 - y0) if self.area_mode == "correct" else (y1 - x1) * (y0 - x0)
        return torch.cat([box_BR4, area_BR[..., None]], -1)

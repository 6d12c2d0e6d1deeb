"""Where the visual tokens of VL-T5 come from: a detector's regions, or the cells of a timm tower.

Both say the same of each token: its feature, its box, which picture of the row and which region of it it is. Rows
without a picture run on a zero one under a mask that is False, so that all ranks run the same modules. How many tokens
a row has is in the config: shapes do not depend on the data, and no device is asked for a number.

Shapes: B = rows, N = images of the batch, M = images of a row, P = cells of an image, K = boxes, R = visual tokens of
a row, C = numbers of a feature.
"""

import math
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.models import vision
from pretrain.models.base import Look

MOST = 100  #: visual tokens of a picture, as there are sentinels
IMAGES = 2  #: of a row


class Config(Section):
    """`model.vision`: what the visual tokens are."""

    #: region: a detector's boxes and features, from the batch; grid: the cells of a timm tower's map; patch: a ViT's
    source: Literal["region", "grid", "patch"] = "region"
    width: int = Field(default=2048, gt=0)  #: numbers of a detector's feature
    regions: int = Field(default=36, gt=0, le=MOST)  #: of a detector's boxes of a row; further ones are left out
    images: int = Field(default=1, gt=0, le=IMAGES)  #: pictures of a row, at most
    tower: vision.Config | None = None  #: of grid and patch
    cells: int | None = Field(default=None, gt=0, le=10)  #: pool to so many cells a side (max); None: as they come
    grid_boxes: Literal["cell", "zero"] = "cell"  #: the box of a cell: its own, or zeros as in VL-Adapter
    area_mode: Literal["correct", "legacy"] = "correct"  #: legacy: the area as released VL-T5 weights have learned it
    norm: Literal["each", "sum"] | None = None  #: norms after each linear (T5's) or of the sum; None: as the backbone's

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if (self.source == "region") != (self.tower is None):
            raise ValueError("tower is the timm tower of source grid or patch; a detector's regions have none")
        if self.source == "region" and self.cells is not None:
            raise ValueError("cells pools the cells of a tower; leave it out with source=region")
        if self.source == "region" and self.images > 1:
            raise ValueError("images: a batch does not say which picture a detector's box is of; take a tower for two")
        if self.tower is not None and self.tower.patch_dropout:
            raise ValueError("tower.patch_dropout: the cells of a picture are told by their place; set it to 0")
        return self

    @property
    def look(self) -> Look:
        """Return how pictures are prepared; small where a detector has seen them before."""
        return Look(self.tower.image_size, self.tower.interpolation) if self.tower else Look(32, "bilinear")


class VisualTokens(NamedTuple):
    """The visual tokens of rows, side by side; padding is False in `valid_BR`."""

    features_BRC: Tensor
    boxes_BR4: Tensor  #: x0 y0 x1 y1 in [0, 1]
    image_BR: Tensor  #: int64, which picture of the row
    region_BR: Tensor  #: int64, which region of that picture
    valid_BR: Tensor


class Regions(nn.Module):
    """Regions as they are in the batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.width, self.most = config.width, config.regions

    def forward(self, batch: Batch, device: torch.device) -> VisualTokens:
        """Return the regions of each row in the order of the batch.

        Raises:
            ConfigError: features of another width.
        """
        rows = len(batch)
        feature_KC, box_K4, owner_K = batch.region_KC, batch.boxes_K4, batch.box_owner_K
        if feature_KC is None or box_K4 is None or owner_K is None:
            feature_KC, box_K4 = torch.zeros(0, self.width, device=device), torch.zeros(0, 4, device=device)
            owner_K = torch.zeros(0, dtype=torch.long, device=device)
        if feature_KC.shape[1] != self.width:
            raise ConfigError(
                f"model.vision.width: {self.width}, the features of the data have {feature_KC.shape[1]} numbers"
            )
        there_K = torch.ones_like(owner_K, dtype=torch.bool)
        place_K = _places(owner_K).clamp(max=self.most)  # what is too many shares a place that is cut off

        def by_row(x_KX: Tensor) -> Tensor:
            return _laid_out(x_KX, owner_K, place_K, rows, self.most + 1)[:, : self.most]

        region_BR = torch.arange(self.most, device=device).expand(rows, self.most)
        return VisualTokens(by_row(feature_KC), by_row(box_K4), torch.zeros_like(region_BR), region_BR, by_row(there_K))


class Cells(nn.Module):
    """The cells of a timm tower, row by row from the top: what VL-Adapter puts in the place of a detector."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.tower is not None, "the config has a tower where there is no detector"
        self.config, self.size = config, config.tower.image_size
        self.tower = vision.VisionTower(config.tower, None)
        self.width = self.tower.width

    def forward(self, batch: Batch, device: torch.device) -> VisualTokens:
        """Return the cells of the pictures of each row, one picture after the other.

        Raises:
            ConfigError: more pictures than the config says, or more cells than there are sentinels.
        """
        rows, most = len(batch), self.config.images
        image_NCHW, owner_N = batch.image_NCHW, batch.owner_N
        if image_NCHW is not None and owner_N is None:
            owner_N = torch.arange(rows, device=device)
        there = image_NCHW is not None and len(image_NCHW) > 0
        if not there:
            image_NCHW = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=device)
            owner_N = torch.zeros(1, dtype=torch.long, device=device)
        with nullcontext() if there else self.tower.unseen():
            cell_NPC = self._pooled(self.tower(image_NCHW).tokens_NPC)
        if len(owner_N) > rows * most:
            raise ConfigError(f"model.vision.images: {len(owner_N)} pictures for {rows} rows of {most}; set it to 2")
        count = cell_NPC.shape[1]
        place_N = _places(owner_N)
        valid_BM = _laid_out(torch.full_like(owner_N, there, dtype=torch.bool), owner_N, place_N, rows, most)
        image_BM = torch.arange(most, device=device).expand(rows, most)
        region_P = torch.arange(count, device=device)
        return VisualTokens(
            _laid_out(cell_NPC, owner_N, place_N, rows, most).flatten(1, 2),
            self._boxes(count, device).expand(rows, most, count, 4).flatten(1, 2),
            image_BM.repeat_interleave(count, 1),
            region_P.expand(rows, most, count).flatten(1),
            valid_BM.repeat_interleave(count, 1),
        )

    def _pooled(self, cell_NPC: Tensor) -> Tensor:
        side, cells = math.isqrt(cell_NPC.shape[1]), self.config.cells
        assert side * side == cell_NPC.shape[1], "square pictures have square maps"
        if cells is not None and cells != side:
            map_NCHW = cell_NPC.transpose(1, 2).unflatten(-1, (side, side))
            cell_NPC = F.adaptive_max_pool2d(map_NCHW, cells).flatten(2).transpose(1, 2)
        if cell_NPC.shape[1] > MOST:
            raise ConfigError(
                f"model.vision.cells: the tower gives {side} x {side} cells, there are sentinels for {MOST}; "
                "set it to 10 or less"
            )
        return cell_NPC

    def _boxes(self, count: int, device: torch.device) -> Tensor:
        """Return the box [P, 4] of each cell."""
        side = math.isqrt(count)
        if self.config.grid_boxes == "zero":
            return torch.zeros(count, 4, device=device)
        place_P = torch.arange(count, device=device)
        x_P, y_P = place_P % side, place_P // side
        return torch.stack([x_P, y_P, x_P + 1, y_P + 1], 1) / side


def build(config: Config) -> Regions | Cells:
    """Return the source that the config names.

    Raises:
        ConfigError: a tower of the other kind.
    """
    if config.source == "region":
        return Regions(config)
    found = Cells(config)
    patches = hasattr(found.tower.trunk, "patch_embed") and hasattr(found.tower.trunk, "blocks")
    if patches != (config.source == "patch"):
        kind = "patch" if patches else "grid"
        raise ConfigError(f"model.vision.source: the cells of {found.tower.config.name} are those of source={kind}")
    return found


def grid(config: Config) -> tuple[int, int]:
    """Return the rows and columns of a tower's cells, from shapes alone: nothing is computed, no file is read."""
    bare = config.model_copy(deep=True)
    assert bare.tower is not None, "a detector's regions are no grid"
    bare.tower.weights = None
    with torch.device("meta"):
        made = Cells(bare)
        picture_1CHW = torch.zeros(1, 3, made.size, made.size)
        side = math.isqrt(made.eval()._pooled(made.tower(picture_1CHW).tokens_NPC).shape[1])
    return side, side


def _laid_out(x_KX: Tensor, owner_K: Tensor, place_K: Tensor, rows: int, most: int) -> Tensor:
    """Return things by row [B, most, ...], zero where a row has fewer."""
    return x_KX.new_zeros(rows, most, *x_KX.shape[1:]).index_put((owner_K, place_K), x_KX)


def _places(owner_K: Tensor) -> Tensor:
    """Return the place of each thing in its row; the things of a row are neighbours."""
    return torch.arange(len(owner_K), device=owner_K.device) - torch.searchsorted(owner_K, owner_K)

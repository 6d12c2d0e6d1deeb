"""Small copies of a batch's pictures, as data URLs, for what people look at.

Shapes: N = images, B = rows, C H W = channels, height, width.
"""

import base64
import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pretrain.batch import Batch


def small(image_NCHW: Tensor, side: int) -> Tensor:
    """Return uint8 pictures [N, C, side, side]."""
    return F.interpolate(image_NCHW.float(), size=(side, side), mode="area").round().to(torch.uint8)


def webp(image_CHW: Tensor) -> str:
    """Return a uint8 picture as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()).save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def of_rows(batch: Batch, rows: int, side: int) -> list[str]:
    """Return the first picture of each of the first rows, "" for a row without one."""
    if batch.image_NCHW is None or batch.owner_N is None:
        return [""] * rows
    owners = batch.owner_N.tolist()
    first = [owners.index(row) if row in owners else None for row in range(rows)]
    shown = [number for number in first if number is not None]
    made = iter([webp(one) for one in small(batch.image_NCHW[shown], side)] if shown else [])
    return ["" if number is None else next(made) for number in first]

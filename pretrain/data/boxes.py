"""Boxes: from what annotations write to corners in [0, 1] of the upright picture.

Letters: K = boxes; the four numbers are x0 y0 x1 y1 after `normalised`.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.data.decode import BadSample

Layout = Literal["xywh", "xyxy", "cxcywh"]
Unit = Literal["pixels", "fractions"]
SLACK = 0.02  #: so far the annotated and the real shape of a picture may differ: a resized one is rounded to pixels


def normalised(found: Any, what: str, size: tuple[float, float], *, layout: Layout, unit: Unit) -> NDArray[np.float32]:
    """Return float32 [K, 4] in [0, 1], cut at the borders of the picture; `size` is the width and height they refer to.

    Raises:
        BadSample: no numbers, a box without area or outside the picture, or numbers that look like the other unit.
    """
    boxes_K4 = _numbers(found, what)
    if layout != "xyxy":
        width_K2 = boxes_K4[:, 2:].copy()
        if layout == "cxcywh":
            boxes_K4[:, :2] -= width_K2 / 2
        boxes_K4[:, 2:] = boxes_K4[:, :2] + width_K2
    if unit == "pixels":
        if np.abs(boxes_K4).max() <= 1 and min(size) > 2:
            raise BadSample(f"{what} looks like fractions, set unit: fractions ({found})")
        boxes_K4 /= np.array([*size, *size])
    elif np.abs(boxes_K4).max() > 1.5:
        raise BadSample(f"{what} looks like pixels, set unit: pixels ({found})")
    inside_K4 = boxes_K4.clip(0, 1)
    if not (inside_K4[:, 2:] > inside_K4[:, :2]).all():
        raise BadSample(f"{what} has no area inside the picture of {size[0]:g} x {size[1]:g}: {found}")
    return inside_K4.astype(np.float32)


def _numbers(found: Any, what: str) -> NDArray[np.float64]:
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    for row in rows:
        if not (isinstance(row, list) and len(row) == 4 and all(_finite(value) for value in row)):
            raise BadSample(f"{what} is no four numbers, nor a list of them: {found!r}")
    return np.array(rows, dtype=np.float64)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


def reference(declared: tuple[Any, Any], real: tuple[int, int]) -> tuple[float, float]:
    """Return the width and height that pixels of boxes refer to: the declared ones, or the picture's own.

    Raises:
        BadSample: the declared size is none, or of another shape than the upright picture (which may be smaller).
    """
    if declared == (None, None):
        return real
    if not all(_finite(side) and side > 0 for side in declared):
        raise BadSample(f"width and height are {declared[0]!r} and {declared[1]!r}, expected two positive numbers")
    width, height = (float(side) for side in declared)
    rounding = 1 / min(real)  # of a small copy
    if abs(math.log(width * real[1] / (height * real[0]))) > SLACK + rounding:
        raise BadSample(
            f"boxes are for a picture of {width:g} x {height:g}, this one is {real[0]} x {real[1]} when upright"
        )
    return width, height


def cells(grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return the cells of a grid of (rows, columns) as boxes [K, 4], row by row from the top."""
    rows, columns = grid
    y_K, x_K = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x_K / columns, y_K / rows, (x_K + 1) / columns, (y_K + 1) / rows], 1).astype(np.float32)

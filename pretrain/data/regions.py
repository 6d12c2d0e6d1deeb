"""Regions that a detector has found in a picture, kept beside it: what VL-T5 sees of pictures (Cho et al. 2021,
arXiv:2102.02779; Anderson et al. 2018, arXiv:1707.07998).

Source: a list of boxes in the json or a .npy member, and a .npy member of features, float [K, C] in the same order.

Letters: K = regions, C = width of a feature; boxes are x0 y0 x1 y1 in [0, 1] of the upright and whole picture.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.boxes import Layout, Unit, normalised, reference
from pretrain.data.decode import BadSample
from pretrain.data.picture import Picture


class Config(Section):
    """`data.regions`, or `regions` of one source of a blend."""

    boxes: str = "boxes.npy"  #: a .npy member, or json:KEY
    features: str | None = "features.npy"  #: a .npy member; none: boxes alone
    layout: Layout = "xyxy"
    unit: Unit = "pixels"
    width: fields.Path = "json:width"  #: of the picture that pixels refer to, where the json says it
    height: fields.Path = "json:height"
    #: regions of a picture, further ones are left out; none: as many as the model sees (model.vision.regions)
    most: int | None = Field(default=None, ge=1, le=100)


def attach(example: Example, record: Record, config: Config) -> Example:
    """Return an example with the regions of its record.

    Raises:
        BadSample: they are missing, broken, or not equally many.
    """
    found: Any = fields.lookup(record, example.meta, config.boxes) if config.boxes.startswith(fields.JSON) else None
    if found is None:
        found = _array(record, config.boxes, 4).tolist()
    unit = (1.0, 1.0)
    if config.unit == "pixels":
        declared = (fields.lookup(record, example.meta, key) for key in (config.width, config.height))
        first = next((image for image in example.images if isinstance(image, Picture)), None)
        if first is None:
            raise BadSample("regions in pixels need a picture, which this data.reader does not give")
        unit = reference(tuple(declared), first.size)  # type: ignore[arg-type]
    boxes_K4 = normalised(found, f"box in {config.boxes}", unit, layout=config.layout, unit=config.unit)[: config.most]
    if config.features is None:
        return replace(example, regions_K4=boxes_K4)
    region_KC = _array(record, config.features, None)[: config.most]
    if len(region_KC) != len(boxes_K4):
        raise BadSample(f"{len(boxes_K4)} boxes in {config.boxes}, but {len(region_KC)} features in {config.features}")
    return replace(example, regions_K4=boxes_K4, region_KC=region_KC)


def _array(record: Record, name: str, width: int | None) -> NDArray[np.float32]:
    if name not in record.fields:
        raise BadSample(f"no regions: {name} is not there; it has {', '.join(record.fields) or 'nothing at all'}")
    try:
        found = np.load(io.BytesIO(record.fields[name]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample(f"{name} is no .npy ({error})") from error
    if found.ndim != 2 or not found.size or found.dtype.kind != "f" or width not in (None, found.shape[1]):
        expected = f"floats [regions, {width or 'C'}]"
        raise BadSample(f"{name} holds {found.dtype} {list(found.shape)}, expected {expected}")
    if not np.isfinite(found).all():
        raise BadSample(f"{name} holds numbers that are not finite")
    array: NDArray[np.float32] = found.astype(np.float32)
    return array

"""A referring expression and the box it means; or a box and the words for it (grounded captioning).

Source: an image, an expression (a text, or a list of which one is drawn) and one box or several as `[x, y, w, h]` in
pixels (COCO, RefCOCO, Visual Genome); other layouts are options. `width` and `height` in the json say which size the
pixels refer to, for pictures that were scaled afterwards; without them it is the size of the upright picture.

`locate`: the prefix is the expression, the suffix is empty, `boxes_K4` is the answer (OFA's bins, VL-T5's region
tokens and CPT's colours are made of it later). `describe`: the prefix is empty, the suffix is the expression, the box
is given. Yu et al. 2016, arXiv:1608.00272 (RefCOCO); Wang et al. 2022, arXiv:2202.03052 (both directions).

Pictures are shown whole, squashed to the model's square, in training and in evaluation, whatever `resize_mode` says:
so boxes are right without being moved. `data.augment` keys that would move pixels are refused; colours may change.
"""

from typing import Literal

from pydantic import Field, model_validator

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.boxes import Layout, Unit, normalised, reference
from pretrain.data.decode import IMAGES
from pretrain.data.readers import base


class Config(Section):
    """Where the picture, the expression and its boxes lie in a sample, and which of the two is asked for."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    text: list[str] = Field(
        default_factory=lambda: ["json:expressions", "json:expression", "json:phrase", "json:caption", "txt"]
    )
    boxes: list[fields.Path] = Field(default_factory=lambda: ["json:boxes", "json:box", "json:bbox"])
    layout: Layout = "xywh"
    unit: Unit = "pixels"
    width: fields.Path = "json:width"  #: of the picture that pixels refer to, where the json says it
    height: fields.Path = "json:height"
    items: fields.Path | None = (
        None  #: a list of objects that hold text and box, one drawn an epoch; none: one a sample
    )
    direction: Literal["locate", "describe"] = "locate"
    prompt: str | None = None  #: the prefix: with a hole {} for the expression to locate, without one to describe

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.prompt is not None and self.prompt.count("{}") != (self.direction == "locate"):
            raise ValueError("prompt: one hole {} where direction is locate, none where it is describe")
        return self


class Reader(base.Reader):
    """Reads an image, an expression and its boxes."""

    boxes = True
    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = fields.draw_item(self.meta(record), config.items, record.draw)
        found, source = fields.first(record, meta, config.text, "expression")
        words = fields.draw_text(found, f"expression in {source}", record.draw, "expression")
        found, source = fields.first(record, meta, config.boxes, "box")
        picture = self.image(record, tuple(config.image))
        declared = (fields.lookup(record, meta, config.width), fields.lookup(record, meta, config.height))
        size = reference(declared, picture.size)
        boxes_K4 = normalised(found, f"box in {source}", size, layout=config.layout, unit=config.unit)
        locate = config.direction == "locate"
        prefix = fields.fill(config.prompt or "{}", words) if locate else config.prompt or ""
        return Example(
            record.key,
            [picture],
            prefix=prefix,
            suffix="" if locate else words,
            group=words,
            boxes_K4=boxes_K4,
            meta=meta,
            draw=record.draw,
            shard=record.shard,
        )

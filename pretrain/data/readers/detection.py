"""A picture and its objects: a box and a name each.

Source: an image and a list of objects in the json, each with a box and a name, which may have an attribute beside it
(Visual Genome, COCO, Open Images; `"objects": [{"box": [x, y, w, h], "label": "car", "attribute": "red"}]`). The prefix
is empty, the suffix the names with commas between; `boxes_K4` and `meta["names"]` hold boxes and names in the same
order. OFA's detection and VL-T5's grounding are made of these (Wang et al. 2022, arXiv:2202.03052; Cho et al. 2021,
arXiv:2102.02779). Pictures are shown whole, as those of grounding are.
"""

from typing import Any

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.boxes import Layout, Unit, normalised, reference
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.readers import base

FIXTURE = {"objects": None}


class Config(Section):
    """Where the picture and its objects lie in a sample."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    objects: fields.Path | None = "json:objects"  #: a list of objects; none: the json itself is the only one
    box: list[str] = Field(default_factory=lambda: ["box", "bbox"])  #: keys of an object, the first that is there
    name: list[str] = Field(default_factory=lambda: ["label", "name", "category", "class"])
    attribute: str = "attribute"  #: key of a word before the name, where there is one
    layout: Layout = "xywh"
    unit: Unit = "pixels"
    width: fields.Path = "json:width"  #: of the picture that pixels refer to, where the json says it
    height: fields.Path = "json:height"
    most: int = Field(default=100, ge=1)  #: objects of a sample; the further ones are left out


class Reader(base.Reader):
    """Reads an image and the boxes and names of its objects."""

    boxes = True
    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = self.meta(record)
        found = [meta] if config.objects is None else fields.lookup(record, meta, config.objects)
        if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
            raise BadSample(f"{config.objects} is no list of objects")
        found = found[: config.most]
        picture = self.image(record, tuple(config.image))
        declared = (fields.lookup(record, meta, config.width), fields.lookup(record, meta, config.height))
        size = reference(declared, picture.size)
        rows = [self._of(one, config.box, "box") for one in found]
        boxes_K4 = normalised(rows, "box of an object", size, layout=config.layout, unit=config.unit)
        names = [self._name(one) for one in found]
        return Example(
            record.key,
            [picture],
            suffix=", ".join(names),
            boxes_K4=boxes_K4,
            meta={**meta, "names": names},
            draw=record.draw,
            shard=record.shard,
        )

    def _of(self, one: dict[str, Any], keys: list[str], what: str) -> Any:
        found = next((one[key] for key in keys if key in one), None)
        if found is None:
            raise BadSample(f"an object has no {what}: none of {', '.join(keys)}")
        return found

    def _name(self, one: dict[str, Any]) -> str:
        name = fields.text(self._of(one, self.config.name, "name"), "name of an object")
        word = one.get(self.config.attribute)
        return f"{fields.text(word, 'attribute of an object')} {name}" if isinstance(word, str) and word else name

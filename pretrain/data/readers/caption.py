"""A picture and a sentence about it: the pairs of contrastive pretraining.

Source: an image and a text member, or a json value that is a text or a list of texts. The prefix is empty, the suffix
is the caption, in one of the `templates` where there are any. Radford et al. 2021, arXiv:2103.00020.
"""

from typing import Any

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.readers import base
from pretrain.dist import hash64


class Config(Section):
    """Where the picture, the caption and its group lie in a sample."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    text: list[str] = Field(default_factory=lambda: ["txt", "json:captions", "json:caption"])  #: likewise; json:KEY
    templates: list[fields.Template] = Field(default_factory=list)  #: sentences with a hole {}, one drawn a sample
    keep_all: bool = False  #: put all captions of a sample in its meta, as "captions", for who needs more than one
    group: fields.Path | None = None  #: json:KEY whose equal values make captions equal; none: equal caption texts


class Reader(base.Reader):
    """Reads an image member and a caption; a list of captions gives one of them, drawn per epoch and sample."""

    config: Config

    def read(self, record: Record) -> Example:
        meta = self.meta(record)
        found, source = fields.first(record, meta, self.config.text, "caption")
        template = "{}"
        if self.config.templates:
            template = self.config.templates[hash64(record.draw, "template") % len(self.config.templates)]
        caption = fields.fill(template, fields.draw_text(found, f"caption in {source}", record.draw, "caption"))
        group = "" if self.config.group is None else _group(record, meta, self.config.group)
        if self.config.keep_all:
            several = found if isinstance(found, list) else [found]
            texts = [fields.text(one, f"caption in {source}") for one in several if str(one).strip()]
            meta = {**meta, "captions": [fields.fill(template, one) for one in dict.fromkeys(texts)]}
        picture = self.image(record, tuple(self.config.image))
        return Example(
            record.key, [picture], suffix=caption, group=group, meta=meta, draw=record.draw, shard=record.shard
        )


def _group(record: Record, meta: dict[str, Any], where: str) -> str:
    found = fields.lookup(record, meta, where)
    if found is None or not fields.encodable(str(found)):
        raise BadSample(f"json has no {where.removeprefix(fields.JSON)!r}, which data.reader.caption.group asks for")
    return str(found)

"""A picture and the class it belongs to.

Source: an image and the index of its class in the json member. The prefix is empty, the suffix is the name of the
class, the target its index; templates are put around it by evals and methods. Radford et al. 2021, arXiv:2103.00020.
"""

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.readers import base


class Config(Section):
    """Where the picture and its class lie in a sample."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    field: str = "class"  #: key of the class index in the json member
    name: str = "name"  #: key of the class name there


class Reader(base.Reader):
    """Reads an image member and a class index; the class name is the text."""

    config: Config

    def read(self, record: Record) -> Example:
        meta = self.meta(record)
        target = meta.get(self.config.field)
        if type(target) is not int or not 0 <= target < 2**31:
            raise BadSample(f"json has {self.config.field}={target!r}, expected the index of a class")
        return Example(
            record.key,
            [self.image(record, tuple(self.config.image))],
            suffix=fields.text(str(meta.get(self.config.name, target)), self.config.name),
            target=target,
            meta=meta,
            draw=record.draw,
            shard=record.shard,
        )

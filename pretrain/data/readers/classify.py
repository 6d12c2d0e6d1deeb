"""A picture and the class it belongs to."""

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
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
        if type(target) is not int or target < 0:
            raise BadSample(f"json has {self.config.field}={target!r}, expected the index of a class")
        return Example(
            record.key,
            [self.image(record, tuple(self.config.image))],
            suffix=str(meta.get(self.config.name, target)),
            target=target,
            meta=meta,
            draw=record.draw,
            shard=record.shard,
        )

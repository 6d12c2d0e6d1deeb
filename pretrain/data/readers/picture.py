"""A picture alone, for what reads pictures only: an image tokenizer, its codes.

Source: an image member; all else of a sample is left unread. The prefix is empty, and so is the suffix. Pictures
without text are what image infilling learns from: Wang et al. 2022, arXiv:2202.03052 (OFA).
"""

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data.decode import IMAGES
from pretrain.data.readers import base


class Config(Section):
    """Where the picture lies in a sample."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there


class Reader(base.Reader):
    """Reads an image member."""

    config: Config

    def read(self, record: Record) -> Example:
        picture = self.image(record, tuple(self.config.image))
        return Example(record.key, [picture], group=record.key, draw=record.draw, shard=record.shard)

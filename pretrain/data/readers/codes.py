"""A picture, or a caption, and the codes of an image tokenizer: image infilling and text-to-image.

Source: a member of codes, uint16 in the order of the raster (little-endian bytes, or a .npy), or a json list; for
infilling the codes of the middle half of each side, encoded alone. The prefix is the caption where one is asked for,
the suffix the symbols `<code_5>` of the codes. Wang et al. 2022, arXiv:2202.03052 (OFA). Pictures are shown whole:
the codes are those of what is seen.
"""

import io
from typing import Any

import numpy as np
from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.readers import base
from pretrain.data.symbols import symbol

FIXTURE = {"codes": ["json:codes"]}
NPY = b"\x93NUMPY"


class Config(Section):
    """Where the picture, the codes and a caption lie in a sample."""

    image: list[str] | None = Field(default_factory=lambda: list(IMAGES))  #: extensions; none: no picture is shown
    codes: list[str] = Field(default_factory=lambda: ["codes", "codes.npy", "json:codes"])  #: the first that is there
    text: list[str] = Field(default_factory=list)  #: of the caption, the prefix; an empty list: none


class Reader(base.Reader):
    """Reads an image, its codes and a caption."""

    codes = True
    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = self.meta(record)
        prefix = ""
        if config.text:
            found, source = fields.first(record, meta, config.text, "caption")
            prefix = fields.draw_text(found, f"caption in {source}", record.draw, "caption")
        codes = self._codes(record, meta)
        return Example(
            record.key,
            self.pictures(record, config.image),
            prefix=prefix,
            suffix=" ".join(symbol(f"<code_{code}>") for code in codes),
            group=record.key,
            meta=meta,
            draw=record.draw,
            shard=record.shard,
            codes=True,
        )

    def _codes(self, record: Record, meta: dict[str, Any]) -> list[int]:
        for source in self.config.codes:
            if source.startswith(fields.JSON):
                found = fields.lookup(record, meta, source)
                if isinstance(found, list) and found and all(type(one) is int and 0 <= one < 65536 for one in found):
                    return found
            elif source in record.fields:
                return decode(record.fields[source], source)
        raise BadSample(f"no codes: none of {', '.join(self.config.codes)} is there, or is a list of codes")


def decode(data: bytes, name: str) -> list[int]:
    """Return the codes of a member.

    Raises:
        BadSample: it is no uint16.
    """
    if not data.startswith(NPY):
        if not data or len(data) % 2:
            raise BadSample(f"{name} has {len(data)} bytes, which is no row of uint16")
        return [int(code) for code in np.frombuffer(data, dtype="<u2")]
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample(f"{name} is no .npy ({error})") from error
    if array.dtype != np.uint16 or not array.size:
        raise BadSample(f"{name} holds {array.dtype}, expected uint16")
    return [int(code) for code in array.ravel()]

"""Text alone, without a picture: what keeps a language tower fluent (Raffel et al. 2020, arXiv:1910.10683).

Source: a text member or a json value. The prefix is empty, the suffix is the text; of a document longer than `words`
words a window is drawn, another one every epoch, its white space as it was.
"""

import re

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.readers import base


class Config(Section):
    """Where the text lies in a sample."""

    text: list[str] = Field(default_factory=lambda: ["txt", "json:text", "json:captions", "json:caption"])
    words: int | None = Field(default=None, ge=1)  #: longest window; none: the text from its beginning
    prompt: str = ""  #: the prefix


class Reader(base.Reader):
    """Reads a text; a list of texts gives one of them, drawn per epoch and sample."""

    config: Config

    def read(self, record: Record) -> Example:
        meta = self.meta(record)
        found, source = fields.first(record, meta, self.config.text, "text")
        text = fields.draw_text(found, f"text in {source}", record.draw, "caption")
        if self.config.words is not None:
            text = _window(text, self.config.words, record.draw)
        return Example(
            record.key, [], prefix=self.config.prompt, suffix=text, meta=meta, draw=record.draw, shard=record.shard
        )


def _window(text: str, words: int, draw: int) -> str:
    places = [match.span() for match in re.finditer(r"\S+", text)]
    spare = len(places) - words
    if spare <= 0:
        return text
    begin = fields.draw_below(spare + 1, draw, "window")
    return text[places[begin][0] : places[begin + words - 1][1]]

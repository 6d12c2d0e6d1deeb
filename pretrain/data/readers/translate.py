"""A sentence in one language and the same in another, with or without a picture.

Source: two texts, found by the code of their language: members such as `en.txt` and `de.utf8`, json such as
`{"en": ..., "de": ...}` or `{"translation": {"en": ..., "de": ...}}`. Multi30K (Elliott et al. 2016,
arXiv:1605.00459), as VL-T5 translates it (Cho et al. 2021, arXiv:2102.02779). The prefix is the source sentence, the
suffix the target sentence.
"""

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.readers import base


class Config(Section):
    """The two languages, and where their texts lie in a sample."""

    source: str = "en"  #: code of the language that is given
    target: str = "de"  #: code of the language that is learned
    text: list[fields.Template] = Field(
        default_factory=lambda: ["{}", "{}.txt", "{}.utf8", "json:{}", "json:translation.{}"]
    )  #: where a text lies, with a hole for the code of its language
    image: list[str] | None = None  #: extensions of a picture that is shown with it; none: text only
    prompt: fields.Template = "{}"  #: the prefix, with a hole for the source sentence


class Reader(base.Reader):
    """Reads the two texts, and the picture if one is asked for."""

    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = self.meta(record)
        given, learned = (self._text(record, meta, code) for code in (config.source, config.target))
        return Example(
            record.key,
            self.pictures(record, config.image),
            prefix=fields.fill(config.prompt, given),
            suffix=learned,
            meta=meta,
            draw=record.draw,
            shard=record.shard,
        )

    def _text(self, record: Record, meta: dict[str, object], code: str) -> str:
        places = [fields.fill(place, code) for place in self.config.text]
        found, source = fields.first(record, meta, places, f"text in {code!r}")
        return fields.text(found, f"text in {source}")

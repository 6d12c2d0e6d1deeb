"""Text with spans taken out, to be filled in: what changes the length of a text happens here, drawn anew every epoch.

Source: a text, or a caption with its picture where `image` names extensions. The prefix is the text with holes, the
suffix what was taken out or the whole text. Spans are runs of words (what is between white space), listed as
[begin, end) in `meta["infill_spans"]` over the words of `meta["infill_words"]`; data.spans has the laws by which they
are drawn.

    t5       `<extra_id_0>`, `<extra_id_1>` ... for each span; the suffix gives each behind its sentinel
             (Raffel et al. 2020, arXiv:1910.10683)
    vl_t5    the same, words picked one by one (Cho et al. 2021, arXiv:2102.02779)
    vl_bart  one `<mask>` a span, the suffix is the whole text
    bart     the same, spans of Poisson lengths, also of none (Lewis et al. 2020, arXiv:1910.13461)

Sentinels and masks are symbols (data.symbols): ids of a vocabulary that has them, spelled by one that has not.
"""

import math

from pydantic import Field, model_validator

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.readers import base
from pretrain.data.spans import RATES, Style, corrupt
from pretrain.data.transforms import generator
from pretrain.dist import hash64

SENTINELS = 100  # that T5's vocabulary has


class Config(Section):
    """Where the text lies in a sample, and how much of it is taken out."""

    text: list[str] = Field(default_factory=lambda: ["txt", "json:text", "json:captions", "json:caption"])
    image: list[str] | None = None  #: extensions of a picture that is shown with it; none: text only
    style: Style = "t5"
    rate: float | None = Field(default=None, gt=0, lt=1)  #: share of the words that is taken out; none: the style's own
    span: float = Field(default=3.0, ge=1)  #: mean number of words of a span (t5, bart)
    words: int = Field(default=256, ge=1)  #: longest window of a text that is read, drawn like the spans
    sentinel: fields.Template = "<extra_id_{}>"  #: stands for a span, with a hole for its number (t5, vl_t5)
    mask: str = Field(default="<mask>", min_length=1)  #: stands for a span (bart, vl_bart)
    prompt: fields.Template = "{}"  #: the prefix, with a hole for the text with holes

    @model_validator(mode="after")
    def _enough_sentinels(self) -> "Config":
        rate = RATES[self.style] if self.rate is None else self.rate
        spans = self.words * rate / (self.span if self.style == "t5" else 1)
        if self.style in ("t5", "vl_t5") and spans > SENTINELS:
            raise ValueError(f"words: {self.words} words can need {math.ceil(spans)} sentinels, there are {SENTINELS}")
        return self


class Reader(base.Reader):
    """Reads a text and takes spans out of it; a list of texts gives one of them, drawn per epoch and sample."""

    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = self.meta(record)
        found, source = fields.first(record, meta, config.text, "text")
        words = fields.draw_text(found, f"text in {source}", record.draw, "caption").split()
        begin = fields.draw_below(max(len(words) - config.words, 0) + 1, record.draw, "window")
        words = words[begin : begin + config.words]
        rng = generator(hash64(record.draw, "infill"))
        holes, said, spans = corrupt(
            words,
            config.style,
            rng,
            rate=config.rate,
            span=config.span,
            sentinel=config.sentinel,
            mask=config.mask,
        )
        return Example(
            record.key,
            self.pictures(record, config.image),
            prefix=fields.fill(config.prompt, holes),
            suffix=said,
            group=" ".join(words).lower(),
            meta={**meta, "infill_words": words, "infill_spans": [list(span) for span in spans]},
            draw=record.draw,
            shard=record.shard,
        )

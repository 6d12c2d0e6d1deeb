"""Text with spans taken out, to be filled in: what changes the length of a text happens here, drawn anew every epoch.

Source: a text, or a caption with its picture where `image` names extensions. The prefix is the text with holes, the
suffix what was taken out or the whole text. Spans are runs of words (what is between white space), listed as
[begin, end) in `meta["infill_spans"]` over the words of `meta["infill_words"]`.

    t5       round(15 %) of the words in spans of 3 on average, `<extra_id_0>`, `<extra_id_1>` ... for each; the suffix
             gives each span behind its sentinel. The spans of Raffel et al. 2020, arXiv:1910.10683: text first, span
             last, both sides cut at random places
    vl_t5    int(15 %) of the words, at least one, each picked alone, neighbours merge; sentinels and suffix as for t5
             (Cho et al. 2021, arXiv:2102.02779)
    vl_bart  the same at 30 %, one `<mask>` a span, the suffix is the whole text
    bart     ceil(30 %) of the words in spans of Poisson(3) words, one `<mask>` a span, a span of no words puts in a
             `<mask>`; the suffix is the whole text (Lewis et al. 2020, arXiv:1910.13461)
"""

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.readers import base
from pretrain.data.transforms import generator
from pretrain.dist import hash64

Style = Literal["t5", "vl_t5", "vl_bart", "bart"]
Span = tuple[int, int]
RATES: dict[Style, float] = {"t5": 0.15, "vl_t5": 0.15, "vl_bart": 0.3, "bart": 0.3}
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
        rate = RATES[config.style] if config.rate is None else config.rate
        rng = generator(hash64(record.draw, "infill"))
        spans = draw_spans(len(words), config.style, rate=rate, span=config.span, rng=rng)
        if config.style in ("t5", "vl_t5"):
            sentinels = [fields.fill(config.sentinel, str(number)) for number in range(len(spans))]
            suffix = " ".join(f"{s} {' '.join(words[a:b])}" for s, (a, b) in zip(sentinels, spans))
        else:
            sentinels = [config.mask] * len(spans)
            suffix = " ".join(words)
        return Example(
            record.key,
            self.pictures(record, config.image),
            prefix=fields.fill(config.prompt, punch(words, spans, sentinels)),
            suffix=suffix,
            group=" ".join(words).lower(),
            meta={**meta, "infill_words": words, "infill_spans": [list(span) for span in spans]},
            draw=record.draw,
            shard=record.shard,
        )


def punch(words: list[str], spans: list[Span], sentinels: list[str]) -> str:
    """Return the words with a sentinel in place of each span."""
    out, reached = [], 0
    for (begin, end), sentinel in zip(spans, sentinels, strict=True):
        out += [*words[reached:begin], sentinel]
        reached = end
    return " ".join([*out, *words[reached:]])


def draw_spans(count: int, style: Style, *, rate: float, span: float, rng: np.random.Generator) -> list[Span]:
    """Return which of `count` words a style takes out, as [begin, end) in rising order."""
    if style == "t5":
        return _segments(count, rate, span, rng)
    if style == "bart":
        return _poisson(count, rate, span, rng)
    picked = np.sort(_shuffled(count, rng)[: max(int(rate * count), 1)])
    runs = np.split(picked, np.flatnonzero(np.diff(picked) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def _segments(count: int, rate: float, span: float, rng: np.random.Generator) -> list[Span]:
    """Kept and taken words alternate, kept ones first; both are cut into as many parts, at places drawn evenly."""
    if count == 1:
        return [(0, 1)]
    taken = min(max(round(count * rate), 1), count - 1)
    parts = min(max(round(taken / span), 1), count - taken)
    spans, reached = [], 0
    for keep, take in zip(_cut(count - taken, parts, rng), _cut(taken, parts, rng)):
        spans.append((reached + keep, reached + keep + take))
        reached += keep + take
    return spans


def _cut(count: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Return `parts` positive lengths that sum up to `count`."""
    cuts = np.sort(_shuffled(count - 1, rng)[: parts - 1]) + 1
    return [int(length) for length in np.diff([0, *cuts, count])]


def _poisson(count: int, rate: float, span: float, rng: np.random.Generator) -> list[Span]:
    """Spans with lengths of a Poisson law until enough words are taken, the last one cut; then set at random places."""
    left, lengths = math.ceil(count * rate), []
    while left:
        lengths.append(min(_poisson_length(span, float(rng.random())), left))
        left -= lengths[-1]
    places = np.sort(_shuffled(count - sum(lengths) + len(lengths), rng)[: len(lengths)])  # of the spans among the kept
    spans, taken = [], 0
    for number, (place, length) in enumerate(zip(places, lengths)):
        begin = int(place) - number + taken
        spans.append((begin, begin + length))
        taken += length
    return spans


def _poisson_length(mean: float, place: float) -> int:
    """Return the length at which the cumulative probability passes `place`."""
    length, chance = 0, math.exp(-mean)
    reached = chance
    while reached < place and length < 10 * mean + 10:
        length += 1
        chance *= mean / length
        reached += chance
    return length


def _shuffled(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(rng.random(count), kind="stable")

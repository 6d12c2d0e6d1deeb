"""Which words of a text are taken out: the span laws of T5, VL-T5, VL-BART and BART.

t5       round(15 %) of the words in spans of 3 on average (Raffel et al. 2020, arXiv:1910.10683): text first, span
         last, both sides cut at random places
vl_t5    int(15 %) of the words, at least one, each picked alone, neighbours merge (Cho et al. 2021,
         arXiv:2102.02779)
vl_bart  the same at 30 %
bart     ceil(30 %) of the words in spans of Poisson(3) words; a span of no words puts in a mask (Lewis et al. 2020,
         arXiv:1910.13461)
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.symbols import symbol

Style = Literal["t5", "vl_t5", "vl_bart", "bart"]
Span = tuple[int, int]
RATES: dict[Style, float] = {"t5": 0.15, "vl_t5": 0.15, "vl_bart": 0.3, "bart": 0.3}


class Corrupted(NamedTuple):
    """A text with holes."""

    holes: str  #: what is left, with a symbol for each span
    said: str  #: what is to be said: the spans behind their sentinels (t5, vl_t5), or the whole text
    spans: list[Span]


def corrupt(
    words: list[str],
    style: Style,
    rng: np.random.Generator,
    *,
    rate: float | None = None,
    span: float = 3.0,
    sentinel: str = "<extra_id_{}>",
    mask: str = "<mask>",
) -> Corrupted:
    """Return words with spans taken out as a style does.

    Args:
        rate: share of the words that is taken out; none: the style's own.
        span: mean number of words of a span (t5, bart).
        sentinel: what stands for a span, with a hole for its number (t5, vl_t5).
        mask: what stands for a span (bart, vl_bart).
    """
    spans = draw_spans(len(words), style, rate=RATES[style] if rate is None else rate, span=span, rng=rng)
    if style in ("bart", "vl_bart"):
        return Corrupted(punch(words, spans, [symbol(mask)] * len(spans)), " ".join(words), spans)
    sentinels = [symbol(sentinel.replace("{}", str(number))) for number in range(len(spans))]
    said = " ".join(f"{mark} {' '.join(words[a:b])}" for mark, (a, b) in zip(sentinels, spans))
    return Corrupted(punch(words, spans, sentinels), said, spans)


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

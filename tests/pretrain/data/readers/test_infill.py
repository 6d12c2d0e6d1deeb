"""Corruption can be undone, takes out exactly as much as its paper says, and never the same for ever."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.data.readers import base
from pretrain.data.spans import RATES, draw_spans
from pretrain.data.symbols import plain
from pretrain.data.transforms import generator
from tests.tiny import record

WORDS = [f"w{number}" for number in range(100)]
STYLES = ["t5", "vl_t5", "vl_bart", "bart"]


def read(draw: int, text: list[str] = WORDS, **options: object):
    example = base.make({"infill": options}).read(record(draw, txt=" ".join(text).encode()))
    return replace(example, prefix=plain(example.prefix), suffix=plain(example.suffix))


def test_holes_are_symbols():
    text = ["w0", "w1", "<extra_id_0>", "w3"]
    example = base.make({"infill": {"style": "vl_t5"}}).read(record(4, txt=" ".join(text).encode()))
    assert example.prefix.count("\0<extra_id_0>\0") == example.suffix.count("\0<extra_id_0>\0") == 1
    assert "<extra_id_0>" in (example.prefix + example.suffix).replace("\0<extra_id_0>\0", ""), "the user's is text"


@pytest.mark.check("vl-t5", 8)
@pytest.mark.parametrize("style", ["t5", "vl_t5"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_splicing_the_spans_back_restores_the_text(style, count):
    for draw in range(30):
        example = read(draw, WORDS[:count], style=style)
        parts = re.split(r"<extra_id_(\d+)>", example.suffix)
        assert parts[0] == "" and [int(n) for n in parts[1::2]] == list(range(len(parts) // 2)), "no closing sentinel"
        taken = {f"<extra_id_{n}>": text.split() for n, text in zip(parts[1::2], parts[2::2])}
        assert all(taken.values())
        assert [w for word in example.prefix.split() for w in taken.get(word, [word])] == WORDS[:count]
        assert sum(word in taken for word in example.prefix.split()) == len(taken)


@pytest.mark.parametrize("style", ["vl_bart", "bart"])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_masked_text_keeps_what_it_shows(style, count):
    for draw in range(30):
        example = read(draw, WORDS[:count], style=style)
        spans, left = example.meta["infill_spans"], example.prefix.split()
        assert example.suffix.split() == example.meta["infill_words"] == WORDS[:count]
        gone = {place for begin, end in spans for place in range(begin, end)}
        assert [word for word in left if word != "<mask>"] == [w for i, w in enumerate(WORDS[:count]) if i not in gone]
        assert left.count("<mask>") == len(spans)


@pytest.mark.check("vl-t5", 8)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [2, 10, 33, 100])
def test_exactly_as_much_as_the_paper_says(style, count):
    rule = {"t5": max(round(0.15 * count), 1), "vl_t5": max(int(0.15 * count), 1),
            "vl_bart": max(int(0.3 * count), 1), "bart": math.ceil(0.3 * count)}  # fmt: skip
    for draw in range(50):
        spans = draw_spans(count, style, rate=RATES[style], span=3.0, rng=generator(draw))
        assert sum(end - begin for begin, end in spans) == rule[style]
        assert all(0 <= begin <= end <= count for begin, end in spans)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        if style == "t5":
            assert len(spans) == max(round(rule["t5"] / 3), 1)
            assert spans[0][0] > 0 and spans[-1][1] == count, "text first, span last"
            assert all(one[1] < other[0] for one, other in pairwise(spans))


def test_poisson_lengths():
    """The law of the lengths before the last one is cut: mean and variance 3, e^-3 of them put in a mask alone."""
    lengths = [
        end - begin
        for draw in range(400)
        for begin, end in draw_spans(1000, "bart", rate=0.3, span=3.0, rng=generator(draw))
    ]
    assert np.mean(lengths) == pytest.approx(3, abs=0.05) and np.var(lengths) == pytest.approx(3, abs=0.15)
    assert lengths.count(0) / len(lengths) == pytest.approx(math.exp(-3), abs=0.005)


@pytest.mark.parametrize("style", STYLES)
def test_places_are_taken_equally_often(style):
    hits = np.zeros(40)
    for draw in range(3000):
        for begin, end in draw_spans(40, style, rate=RATES[style], span=3.0, rng=generator(draw)):
            hits[begin:end] += 1 / 3000
    if style == "t5":
        assert hits[0] == 0 and hits[-1] == pytest.approx(1), "text first, span last"
    else:
        inner = hits[6:-6] if style == "bart" else hits  # spans that do not overlap come less often at the ends
        assert inner == pytest.approx(inner.mean(), rel=0.15)


def test_window_and_picture():
    found = [read(draw, words=10, image=["png"]) for draw in range(200)]
    begins = {example.meta["infill_words"][0] for example in found}
    assert {"w0", "w90"} <= begins and all(len(e.meta["infill_words"]) == 10 and len(e.images) == 1 for e in found)
    assert {example.group for example in found} == {" ".join(e.meta["infill_words"]) for e in found}
    assert read(0, prompt='what is the complete text of "{}"?').prefix.startswith('what is the complete text of "w0 ')


@pytest.mark.parametrize(
    "options", [{"words": 3000}, {"words": 700, "style": "vl_t5"}, {"rate": 1.0}, {"sentinel": "<x>"}, {"span": 0.5}]
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=r"data\.reader\.infill"):
        base.make({"infill": options})

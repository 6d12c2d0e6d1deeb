"""Labelled sentences: GLUE's pairs, and VCR's texts that refer to objects."""

import pytest

from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from pretrain.data.symbols import plain
from tests.tiny import record

PAIR = {"sentence1": "A b.", "sentence2": "C d?", "label": 1}


def read(tree, **options):
    return base.make({"sentences": options}).read(record(json=tree))


def test_pairs():
    found = read(PAIR)
    assert (found.prefix, found.suffix, found.target, found.images) == ("A b. C d?", "yes", 0, [])
    assert found.meta["texts"] == ["A b.", "C d?"]
    single = read({"sentence": "Good.", "label": True}, texts=[["json:sentence"]], labels={"true": "positive"})
    assert single.suffix == "positive" and single.meta["texts"] == ["Good."]


def test_references_of_vcr():
    tree = {**PAIR, "sentence1": ["Why", "do", [0, 2], "smile", "?"], "objects": ["person", "dog", "person"]}
    found = read(tree, image=["png"])
    assert plain(found.meta["texts"][0]) == "Why do person <vis_extra_id_0> and person <vis_extra_id_2> smile ?"
    assert found.meta["texts"][0].count("\0") == 4 and len(found.images) == 1


@pytest.mark.parametrize("change, message", [
    ({"label": 2}, "label is 2, expected one of 1, 0"),
    ({"label": None}, "no label"),
    ({"sentence2": ""}, "text 2 in json:sentence2 is empty"),
    ({"sentence2": [[5]], "objects": ["person"]}, "refers to no object"),
    ({"sentence2": []}, "is empty"),
])  # fmt: skip
def test_broken_samples_are_a_reason(change, message):
    with pytest.raises(BadSample, match=message):
        read({**PAIR, **change})


def test_mistakes():
    with pytest.raises(ConfigError, match="labels"):
        base.make({"sentences": {"labels": {}}})

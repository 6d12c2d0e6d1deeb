"""Which caption is read, which one is drawn, and what makes two the same."""

import pytest

from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from tests.tiny import record


def test_one_of_several_captions_is_drawn():
    reader = base.make({"caption": {}})
    texts = {reader.read(record(draw, json={"captions": ["a", "b", "c"]})).suffix for draw in range(40)}
    assert texts == {"a", "b", "c"}


def test_all_captions_are_kept_where_asked():
    reader = base.make({"caption": {"keep_all": True, "templates": ["an icon of {}"]}})
    example = reader.read(record(json={"captions": [" a", "b ", "a"], "id": 5}))
    assert example.meta == {"captions": ["an icon of a", "an icon of b"], "id": 5}
    assert example.suffix in example.meta["captions"]
    assert reader.read(record(txt=b"c", json={"captions": ["a"]})).meta["captions"] == ["an icon of c"]
    with pytest.raises(BadSample, match="is a int"):
        reader.read(record(json={"captions": ["a", 3]}))


def test_sources_in_order():
    reader = base.make({"caption": {"text": ["json:alt", "txt"]}})
    assert reader.read(record(txt=b" plain \n", json={"x": 1})).suffix == "plain"
    assert reader.read(record(txt=b"plain", json={"alt": "other"})).suffix == "other"


def test_templates_and_group():
    reader = base.make({"caption": {"templates": ["an icon of {}", "{}!"], "group": "json:id"}})
    found = [reader.read(record(draw, txt=b"a {} cat", json={"id": 5})) for draw in range(20)]
    assert {example.suffix for example in found} == {"an icon of a {} cat", "a {} cat!"}
    assert {example.group for example in found} == {"5"}
    with pytest.raises(BadSample, match="no 'id'"):
        reader.read(record(txt=b"x", json={}))


def test_all_captions_are_kept():
    reader = base.make({"caption": {"keep_all": True, "templates": ["an icon of {}"]}})
    example = reader.read(record(json={"captions": ["a cat", "b ", "a cat", "b"]}))
    assert example.meta["captions"] == ["an icon of a cat", "an icon of b"]
    assert example.suffix in example.meta["captions"]
    assert reader.read(record(txt=b"one")).meta["captions"] == ["an icon of one"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"txt": b""}, "empty"),
        ({"json": {"caption": 3}}, "is a int"),
        ({"json": {"captions": []}}, "is a list"),
        ({"json": [1]}, "expected an object"),
        ({}, "no caption"),
    ],
)
def test_bad_captions(fields, words):
    with pytest.raises(BadSample, match=words):
        base.make({"caption": {}}).read(record(**fields))


def test_bad_options():
    for options in ({"group": "id"}, {"templates": ["none"]}):
        with pytest.raises(ConfigError, match=r"data\.reader\.caption"):
            base.make({"caption": options})
    with pytest.raises(ConfigError, match="exactly one reader"):
        base.make({})

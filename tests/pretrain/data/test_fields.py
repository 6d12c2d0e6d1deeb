"""Values by extension and by path, in order, and what is no text."""

import pytest

from pretrain.batch import Record
from pretrain.data import fields
from pretrain.data.decode import BadSample

RECORD = Record("k", "a.tar", {"txt": b" one ", "json": b"{}"})
META = {"a": {"b": "deep"}, "a.b": "flat", "none": None, "c": {"d": {"e": 1}}}


def test_lookup():
    assert fields.lookup(RECORD, META, "txt") == " one "
    assert fields.lookup(RECORD, META, "json:a.b") == "flat", "a key with a dot comes before a path"
    assert fields.lookup(RECORD, META, "json:c.d.e") == 1
    assert all(fields.lookup(RECORD, META, s) is None for s in ("png", "json:none", "json:c.x.e", "json:a.b.c"))


def test_first_in_order():
    assert fields.first(RECORD, META, ["json:none", "json:c.d.e", "txt"], "x") == (1, "json:c.d.e")
    with pytest.raises(BadSample, match=r"no caption: none of png, json:x; it has txt, json, json:a, json:a.b, json:n"):
        fields.first(RECORD, META, ["png", "json:x"], "caption")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (3, "x is a int, expected text"),
        (" \n", "x is empty"),
        ("a" * 1_000_001, "x has 1000001 characters, over 1000000"),
        ("a\0 \0c", "holds NUL"),
        ("half \ud83d", "half a surrogate pair"),
        ([], "list without entries"),
    ],
)
def test_no_text(found, words):
    with pytest.raises(BadSample, match=words):
        fields.draw_text(found, "x", 0, "salt")


def test_a_reason_fits_a_line():
    assert len(str(BadSample("x" * 9000))) < 600


def test_draw_item():
    meta = {"id": 1, "list": [{"a": 1}, {"a": 2, "id": 3}]}
    found = [fields.draw_item(meta, "json:list", draw) for draw in range(20)]
    assert {(one["a"], one["id"]) for one in found} == {(1, 1), (2, 3)} and meta["id"] == 1
    assert fields.draw_item(meta, None, 5) is meta
    for source in ("json:id", "json:none"):
        with pytest.raises(BadSample, match="no list of objects"):
            fields.draw_item(meta, source, 0)

"""Two languages of one sample, wherever they lie, with and without the picture."""

import pytest

from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from tests.tiny import record


@pytest.mark.parametrize(
    "members",
    [
        {"en": b"a cat\n", "de": "eine Kätzin".encode()},
        {"en.utf8": b"a cat", "de.txt": "eine Kätzin".encode()},
        {"json": {"en": "a cat", "de": "eine Kätzin"}},
        {"json": {"translation": {"en": "a cat", "de": "eine Kätzin"}}},
    ],
)
def test_sources(members):
    example = base.make({"translate": {}}).read(record(**members))
    assert (example.prefix, example.suffix, example.images) == ("a cat", "eine Kätzin", [])
    back = {"source": "de", "target": "en", "image": ["png"], "prompt": "translate German to English: {}"}
    example = base.make({"translate": back}).read(record(**members))
    assert example.prefix == "translate German to English: eine Kätzin" and example.suffix == "a cat"
    assert len(example.images) == 1


def test_missing_language():
    with pytest.raises(BadSample, match=r"no text in 'fr': none of fr, fr.txt, .*json:translation.fr; it has png, en"):
        base.make({"translate": {"target": "fr"}}).read(record(en=b"a cat"))

"""Text alone: from its beginning, or a window that is drawn."""

from pretrain.data.readers import base
from tests.tiny import record

TEXT = "\n".join(f"word{number}  next" for number in range(50))


def test_whole_text():
    example = base.make({"text": {"prompt": "say:"}}).read(record(txt=TEXT.encode()))
    assert (example.prefix, example.suffix, example.images) == ("say:", TEXT, [])


def test_window():
    reader = base.make({"text": {"words": 7}})
    found = [reader.read(record(draw, txt=TEXT.encode())).suffix for draw in range(300)]
    assert all(len(text.split()) == 7 and text in TEXT for text in found)
    assert {text.split()[0] for text in found} >= {"word0", "next", "word46"}
    assert reader.read(record(txt=b"a  b\nc")).suffix == "a  b\nc"

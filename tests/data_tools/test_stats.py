"""Stats: a page that stands alone, the same each time, with what the set holds on it."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_tools import _overview, _plot
from data_tools.__main__ import main
from pretrain.data import tokenizer
from tests.data_tools import sets


def page(tmp_path: Path, source: Path, name: str = "page.html", *words: str) -> str:
    assert main(["stats", str(source), "--out", str(tmp_path / name), *words]) == 0
    return (tmp_path / name).read_text()


class Check(HTMLParser):
    """Counts tags, and fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


def test_page_stands_alone_and_says_what_is_there(tmp_path: Path) -> None:
    source = sets.pairs(tmp_path / "in", number=3, samples=10)
    sets.write(source / "test-00000.tar", {
        "odd": {"png": sets.encoded(sets.pixels(9, 200, 50), "PNG"), "json": b'{"captions": ["<b>one</b>", "two"]}'},
        "bad": {"jpg": b"junk", "txt": b"x"},
    })  # fmt: skip
    tokenizer.train(["picture number of many"], 520).save(tmp_path / "tokens")
    text = page(tmp_path, source, "page.html", "--tokenizer", str(tmp_path / "tokens"), "--pictures", "40")
    check = Check()
    check.feed(text)
    assert not check.open
    assert all(source.startswith("data:image/webp;base64,") for source in check.sources)
    assert check.seen["img"] == 31, "all samples but the bad one"
    assert "script" not in check.seen
    assert "url(" not in text
    assert "&lt;b&gt;one&lt;/b&gt; (and 1 more)" in text
    for words in ("32 pairs", "Tokens a caption", "image header cannot be read", "png: 1 (3.2%)", "test", "train"):
        assert words in text
    assert not list(tmp_path.glob(".*unfinished")), "nothing is left behind"


def test_pages_are_equal_but_for_the_seed(tmp_path: Path) -> None:
    source = sets.pairs(tmp_path / "in", number=4)
    words = ["--pictures", "5", "--workers"]
    first = page(tmp_path, source, "a.html", *words, "1")
    assert first == page(tmp_path, source, "b.html", *words, "2")
    shown = re.findall(r"<small>[^<]*", first)
    assert len(shown) == 5
    assert shown != re.findall(r"<small>[^<]*", page(tmp_path, source, "c.html", *words, "1", "--seed", "1"))


def test_goes_on_after_sigkill(tmp_path: Path) -> None:
    source = sets.pairs(tmp_path / "in", number=100)
    out = tmp_path / "page.html"
    sets.kill_in_the_middle(["stats", str(source), "--out", str(out)], tmp_path / ".page.html.unfinished")
    assert not out.exists()
    assert page(tmp_path, source) == page(tmp_path, source, "whole.html")


def test_odd_sets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sets.write(tmp_path / "in" / "a.tar", {"bad": {"jpg": b"junk"}})
    assert "cannot be used" in page(tmp_path, tmp_path / "in")
    assert main(["stats", str(tmp_path / "in"), "--out", str(tmp_path)]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err


def test_bins() -> None:
    assert _overview.linear(Counter({3: 2, 5: 1})) == [("3", 2), ("4", 0), ("5", 1)]
    many = _overview.linear(Counter({n: 100 for n in range(100)} | {5000: 3}))
    assert len(many) <= _overview.BINS + 1
    assert sum(n for _, n in many) == 10003
    assert many[-1][0].endswith("+")
    assert _overview.linear(Counter()) == []
    assert [_overview.ratio(x) for x in (0, 1, -1, 0.5)] == ["1:1", "2:1", "1:2", "1.41:1"]
    assert _overview.size(1_284_000_000) == "1.28 GB"
    assert _plot.bars([], unit="x").startswith("<svg")

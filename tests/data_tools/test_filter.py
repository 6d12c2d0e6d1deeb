"""Filter: every rule, scores, what is told, resumption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import _rules
from data_tools.__main__ import main
from tests.data_tools import sets


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    sets.write(folder / "train-00000.tar", {
        "fine": {"jpg": sets.encoded(sets.pixels(1, 90, 60)), "txt": b"a house in the woods"},
        "small": {"jpg": sets.encoded(sets.pixels(2, 30, 31)), "txt": b"a house in the woods"},
        "wide": {"png": sets.encoded(sets.pixels(3, 200, 50), "PNG"), "txt": b"a house in the woods"},
        "short": {"jpg": sets.encoded(sets.pixels(4, 80, 80)), "txt": b"house"},
    })  # fmt: skip
    sets.write(folder / "train-00001.tar", {
        "file": {"jpg": sets.encoded(sets.pixels(5, 80, 80)), "txt": b"IMG_0012.JPG"},
        "cyrillic": {"jpg": sets.encoded(sets.pixels(6, 80, 80)), "txt": "дом в тёмном лесу".encode()},
        "several": {"jpg": sets.encoded(sets.pixels(7, 80, 80)), "json": b'{"captions": ["a house in a wood", "it"]}'},
        "broken": {"jpg": b"junk", "txt": b"a house in the woods"},
        "silent": {"jpg": sets.encoded(sets.pixels(8, 80, 80))},
    })  # fmt: skip
    return folder


def kept(tmp_path: Path, source: Path, *words: str) -> list[str]:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    assert main(["filter", str(source), "--out", str(out), *words]) == 0
    report = json.loads((out / "filter-report.json").read_text())
    found = sets.read(out)
    gone = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert len(found) == report["kept"] == report["samples"] - sum(report["dropped"].values())
    assert {row["key"] for row in gone} | set(found) == set(sets.read(source))
    assert all(found[key] == members for key, members in sets.read(source).items() if key in found)
    return list(found)


USABLE = ["fine", "small", "wide", "short", "file", "cyrillic", "several"]


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (["--min-side", "32"], ["small"]),
        (["--max-side", "150"], ["wide"]),
        (["--max-aspect", "3"], ["wide"]),
        (["--min-words", "2"], ["short", "file", "several"]),
        (["--max-words", "4"], ["fine", "small", "wide", "several"]),
        (["--caption-matches", "house"], ["file", "cyrillic", "several"]),
        (["--caption-lacks", "(?i)woods$"], ["fine", "small", "wide"]),
        (["--min-ascii", "0.5"], ["cyrillic"]),
        (["--no-noise"], ["file"]),
        (["--min-side", "32", "--no-noise"], ["small", "file"]),
    ],
)
def test_rules(tmp_path: Path, source: Path, words: list[str], gone: list[str]) -> None:
    assert kept(tmp_path, source, *words) == [key for key in USABLE if key not in gone]


def test_counts_of_each_rule(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--min-side", "55", "--max-aspect", "2", "--report-only", "--out", str(tmp_path / "out")]
    assert main(["filter", str(source), *words]) == 0
    report = json.loads((tmp_path / "out" / "filter-report.json").read_text())
    assert report["dropped"] == {"unusable": 2, "min-side": 2, "max-aspect": 0}, "the first rule that is broken"
    assert report["broken"] == {"unusable": 2, "min-side": 2, "max-aspect": 1}
    assert "5 of 9 samples stay" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.tar"))


NOISE = (
    "IMG_1234.jpg", "DSC 0123", "dog.png", "http://a.example/b.jpg", "www.example.com", "12345 - 3456", "$19.99",
    "2019",     "hello hello hello hello", "buy buy now buy buy", "!!! ???", "me@example.com",
)  # fmt: skip
WORDS = (
    "a red house", "image 3 dogs", "घर के सामने एक कुत्ता", "บ้านสีแดง", "红色的房子", "Фото дома", "café",
    "a dog, a dog and a cat", "Route 66 at night", "see example.com for a picture of the old town hall in winter", "🐶",
)  # fmt: skip


@pytest.mark.parametrize("caption", NOISE + WORDS)
def test_noise(caption: str) -> None:
    assert _rules.is_noise(caption) == (caption in NOISE)


def scores(folder: Path, rows: list[tuple[str, str, float]], column: str = "score") -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `tools` is not installed")
    from pyarrow import parquet

    columns = dict(zip(("shard", "key", column), zip(*rows)))
    parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), folder / "s.parquet")
    return folder / "s.parquet"


ROWS = [
    ("train-00000.tar", "fine", 0.3), ("train-00000.tar", "small", 0.9), ("train-00000.tar", "wide", 0.2),
    ("train-00000.tar", "short", 0.3), ("train-00001.tar", "file", 0.1), ("train-00001.tar", "cyrillic", 0.3),
    ("elsewhere-00000.tar", "fine", 1.0),
]  # fmt: skip


def test_scores(tmp_path: Path, source: Path) -> None:
    table = str(scores(tmp_path, ROWS))
    assert kept(tmp_path, source, "--scores", table, "--min-score", "0.3") == ["fine", "small", "short", "cyrillic"]
    best = kept(tmp_path, source, "--scores", table, "--keep-fraction", "0.5")
    assert best == ["fine", "small", "short"], "equal scores stay in the order of the set, and without score is out"
    rest = kept(tmp_path, source, "--scores", table, "--keep-fraction", "0.5", "--min-side", "32", "--no-noise")
    assert rest == ["fine", "short"], "the best of those that pass the other rules"
    other = str(scores(tmp_path, ROWS, "laion"))
    assert kept(tmp_path, source, "--scores", other, "--score-column", "laion", "--min-score", "0.5") == ["small"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no rule is given"),
        (["--keep-fraction", "0.5"], "--scores goes with"),
        (["--caption-matches", "("], "no regular expression"),
        (["--max-aspect", "0.5"], "at least 1"),
        (["--scores", "gone.parquet", "--min-score", "1"], "no such file"),
    ],
)
def test_sentences(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    try:
        code = main(["filter", str(source), "--out", str(tmp_path / "out"), *words])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_scores_of_another_set(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture) -> None:
    table = str(scores(tmp_path, ROWS[-1:]))
    assert main(["filter", str(source), "--out", str(tmp_path / "o"), "--scores", table, "--min-score", "0"]) == 2
    assert "names no sample of this set" in capsys.readouterr().err
    table = str(scores(tmp_path, ROWS, "laion"))
    assert main(["filter", str(source), "--out", str(tmp_path / "o"), "--scores", table, "--min-score", "0"]) == 2
    assert "no column 'score'" in capsys.readouterr().err


def test_goes_on_after_sigkill_with_the_same_bytes(tmp_path: Path) -> None:
    source, out = sets.pairs(tmp_path / "in", number=80), tmp_path / "out"
    words = ["filter", str(source), "--max-words", "7", "--shard-size", "3"]
    sets.kill_in_the_middle([*words, "--out", str(out)], out / ".build", results="rules-*.result")
    assert not (out / "filter-report.json").exists()
    sets.kill_in_the_middle([*words, "--out", str(out)], out / ".build", results="copy-*.result")
    assert not (out / "dataset.json").exists()
    assert main([*words, "--out", str(out), "--workers", "2"]) == 0
    assert main([*words, "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    assert sets.contents(out) == sets.contents(tmp_path / "whole")
    assert 0 < len(sets.read(out)) < 640


@pytest.mark.slow
def test_the_table_that_encode_writes(tmp_path: Path) -> None:
    from tests import tiny

    source, table = tiny.corpus(tmp_path / "in"), tmp_path / "scores.parquet"
    model = tiny.export(tmp_path / "model")
    shards = [str(path) for path in sorted(source.glob("*.tar"))]
    command = [sys.executable, "pretrain/encode.py", str(model), *shards, "--scores", str(table)]
    subprocess.run(command, cwd=sets.ROOT, check=True, timeout=300)
    words = ["--scores", str(table), "--keep-fraction", "0.25", "--out", str(tmp_path / "out")]
    assert main(["filter", *shards, *words]) == 0
    assert len(sets.read(tmp_path / "out")) == 24

"""Dedup: what goes, what stays, what is told of it, resumption."""

import json
from pathlib import Path

import pytest
from PIL import ImageEnhance

from data_tools.__main__ import main
from pretrain.data import format as shards
from tests.data_tools import sets


def photo(seed: int, quality: int = 90, side: int = 160, bright: float = 1.0) -> bytes:
    image = ImageEnhance.Brightness(sets.pixels(seed, 320, 240)).enhance(bright)
    return sets.encoded(image.resize((side, side * 3 // 4)), quality=quality)


def dropped(out: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return {row["key"]: (row["kept_key"], row["because"]) for row in rows}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five different pictures, a copy of bytes, two near copies, and one picture that cannot be read."""
    folder = tmp_path / "in"
    sets.write(folder / "train-00000.tar", {
        "a": {"jpg": photo(1), "txt": b"A dog on a beach."},
        "b": {"jpg": photo(2), "txt": b"a cat"},
        "c": {"jpg": photo(3), "txt": b"a very long sentence about the boat in the harbour at night"},
        "broken": {"jpg": b"junk", "txt": b"x"},
    })  # fmt: skip
    sets.write(folder / "train-00001.tar", {
        "a-bytes": {"jpg": photo(1), "txt": b"other words"},
        "a-small": {"jpg": photo(1, 60, 120), "txt": b"a dog on a beach"},
        "b-bright": {"jpg": photo(2, bright=1.05, side=240), "txt": b"something else"},
        "d": {"jpg": photo(4), "txt": b"a  DOG, on a beach!"},
        "e": {"jpg": photo(5), "txt": b"a very long sentence about the boat in a harbour at night"},
    })  # fmt: skip
    return folder


def test_bytes_and_looks(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["dedup", str(source), "--out", str(out)]) == 0
    assert dropped(out) == {"a-bytes": ("a", "bytes"), "a-small": ("a", "image"), "b-bright": ("b", "image")}
    kept = sets.read(out)
    assert list(kept) == ["a", "b", "c", "broken", "d", "e"]
    assert all(kept[key] == members for key, members in sets.read(source).items() if key in kept)
    said = capsys.readouterr().out
    assert "3 of 9 samples go" in said
    assert "1  pictures could not be read; they stay" in said
    report = json.loads((out / "dedup-report.json").read_text())
    assert report["dropped_for"] == {"bytes": 1, "image": 2}
    page = (out / "dropped.html").read_text()
    assert page.count("<figure>") == 6
    assert 'src="data:' in page
    assert "http" not in page
    words = ["--without", str(out / "dropped.jsonl"), "--out", str(tmp_path / "again")]
    assert main(["reshard", str(source), *words]) == 0
    assert sets.read(tmp_path / "again") == kept, "the list can be applied by reshard"


def test_options(tmp_path: Path, source: Path) -> None:
    def run(name: str, *words: str) -> dict[str, tuple[str, str]]:
        assert main(["dedup", str(source), "--out", str(tmp_path / name), "--report-only", *words]) == 0
        assert not list((tmp_path / name).glob("*.tar"))
        return dropped(tmp_path / name)

    assert run("bytes", "--image-distance", "-1") == {"a-bytes": ("a", "bytes")}
    assert run("largest", "--prefer", "largest")["b"] == ("b-bright", "image")
    same = run("same", "--caption-similarity", "1")
    assert same["d"] == ("a", "caption"), "case, spaces and punctuation do not count"
    assert "e" not in same
    assert run("near", "--caption-similarity", "0.7")["e"] == ("c", "caption")
    both = run("both", "--caption-similarity", "1", "--match", "both")
    assert both == {"a-small": ("a", "image")}


def test_against_a_held_out_set(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture) -> None:
    held = sets.write(tmp_path / "held" / "val-00000.tar", {
        "h": {"jpg": photo(2, 70), "txt": b"held out"},
        "twice": {"jpg": photo(2, 70), "txt": b"held out"},
    })  # fmt: skip
    words = ["--against", str(held), "--out", str(tmp_path / "a")]
    assert main(["dedup", str(source), *words]) == 0
    assert dropped(tmp_path / "a") == {
        "a-bytes": ("a", "bytes"), "a-small": ("a", "image"), "b": ("h", "image"), "b-bright": ("h", "image"),
    }  # fmt: skip
    assert not {"h", "twice"} & set(sets.read(tmp_path / "a"))
    assert "2  of them are like a held-out sample" in capsys.readouterr().out
    assert main(["dedup", str(source), *words[:-1], str(tmp_path / "b"), "--only-against"]) == 0
    assert set(dropped(tmp_path / "b")) == {"b", "b-bright"}
    assert main(["dedup", str(source), "--against", str(source), "--out", str(tmp_path / "c")]) == 2
    assert "is in the set and in --against" in capsys.readouterr().err


def test_a_held_out_split_keeps_its_copy(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    sets.write(folder / "train-00000.tar", {"t": {"jpg": photo(1), "txt": b"x"}, "u": {"jpg": photo(2), "txt": b"y"}})
    sets.write(folder / "validation-00000.tar", {"v": {"jpg": photo(1), "txt": b"z"}})
    assert main(["dedup", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert dropped(tmp_path / "out") == {"t": ("v", "bytes")}
    assert list(sets.read(tmp_path / "out", "validation-*.tar")) == ["v"]
    assert list(sets.read(tmp_path / "out", "train-*.tar")) == ["u"]


def test_wrong_combinations(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture) -> None:
    for words, said in ((["--only-against"], "--against"), (["--match", "both"], "--caption-similarity")):
        assert main(["dedup", str(source), "--out", str(tmp_path / "out"), *words]) == 2
        assert said in capsys.readouterr().err


def test_goes_on_after_sigkill_with_the_same_bytes(tmp_path: Path) -> None:
    source = sets.pairs(tmp_path / "in", number=40)
    sets.pairs(source, number=30, prefix="again")
    words = ["dedup", str(source), "--shard-size", "3", "--caption-similarity", "0.8"]
    out = tmp_path / "out"
    sets.kill_in_the_middle([*words, "--out", str(out)], out / ".build", results="marks-*.result")
    assert not (out / "dropped.jsonl").exists()
    sets.kill_in_the_middle([*words, "--out", str(out)], out / ".build", results="copy-*.result")
    assert not (out / "dataset.json").exists()
    assert all(len(shards.scan(path)) == 3 for path in out.glob("*.tar")), "a final name is a whole shard"
    assert main([*words, "--out", str(out), "--workers", "2"]) == 0
    assert main([*words, "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    assert sets.contents(out) == sets.contents(tmp_path / "whole")
    assert len(sets.read(out)) == 320

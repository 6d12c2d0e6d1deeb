"""Validate, index and tokenizer on good and on broken shards."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.__main__ import main
from pretrain.data import format as shards
from pretrain.data import tokenizer
from tests.data_tools import sets


def image(width: int = 9, height: int = 7) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with shards.ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.add(key, members)
    return path


def good(number: int, start: int = 0) -> dict[str, dict[str, bytes]]:
    return {f"{n:04d}": {"png": image(n + 1), "txt": f"caption {n % 4}".encode()} for n in range(start, start + number)}


def report(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict]:
    code = main(["validate", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_good_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a-00000.tar", good(10))
    write(tmp_path / "a-00001.tar", good(6, 10))
    code, found = report(capsys, str(tmp_path), "--decode", "--batch-size", "8", "--world-size", "4")
    assert code == 0
    assert found["trainable"]
    assert (found["samples"], found["shards"], found["steps_per_epoch"], found["rows_per_process"]) == (16, 2, 2.0, 2)
    assert found["histograms"]["shorter side of the image (pixels)"] == [["1", 1], ["2-3", 2], ["4-7", 13]]
    assert found["histograms"]["words a caption"] == [["2-3", 16]]
    assert found["repeated_captions"][0] == ["caption 0", 4]
    assert main(["validate", f"{tmp_path}/a-{{00000..00001}}.tar"]) == 0
    assert capsys.readouterr().out.endswith("trainable\n")


def test_every_kind_of_bad_sample(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cut = image(200, 200)[:-30]
    write(tmp_path / "a-00000.tar", {
        "no-image": {"txt": b"x"},
        "no-caption": {"png": image()},
        "no-header": {"png": b"junk", "txt": b"x"},
        "cut-off": {"png": cut, "txt": b"x"},
        "empty": {"png": image(), "txt": b" \n"},
        "latin": {"png": image(), "txt": b"caf\xe9"},
        "odd": {"png": image(), "json": b'{"caption": 3}'},
        "listed": {"png": image(), "json": b'{"captions": ["fine", "too"]}'},
    })  # fmt: skip
    code, found = report(capsys, str(tmp_path))
    assert code == 1
    assert found["bad"] == 6, "a header says nothing about the end of the file"
    code, found = report(capsys, str(tmp_path), "--decode")
    assert found["bad"] == 7
    assert set(found["problems"]) == {
        "no image member", "no caption", "image header cannot be read", "image cannot be decoded",
        "caption is empty", "txt is not UTF-8", "caption is neither text nor a list of texts",
    }  # fmt: skip
    assert "7 of 8 samples are bad" in found["reasons"][0]
    assert report(capsys, str(tmp_path), "--decode", "--max-bad-fraction", "0.9")[0] == 0


def test_nothing_usable_and_batches_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "bad" / "a.tar", {"a": {"txt": b"x"}})
    assert "no usable sample" in report(capsys, str(tmp_path / "bad"), "--max-bad-fraction", "1")[1]["reasons"]
    write(tmp_path / "good" / "a.tar", good(6))
    code, found = report(capsys, str(tmp_path / "good"), "--batch-size", "7", "--world-size", "2")
    assert code == 1
    assert "no multiple of world size 2; take 6" in found["reasons"][0]
    assert "larger than the set of 6 samples" in found["reasons"][1]


def test_shards_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.tar", good(4))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    code, found = report(capsys, str(path))
    assert code == 1
    assert "not a readable tar" in found["reasons"][0]
    path.write_bytes(b"not a tar" * 100)
    assert report(capsys, str(path))[0] == 1


def test_index_that_is_not_of_the_tar(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.tar", good(4))
    entries = shards.read_index(path)
    shards.write_index(path, entries[:3])
    code, found = report(capsys, str(path))
    assert code == 1
    assert "differs from the tar" in found["reasons"][0]
    shards.index_path(path).unlink()
    code, found = report(capsys, str(path))
    assert code == 0, "a missing index is made on first use"
    assert "shard without index (made on first use)" in found["notes"]
    shards.write_manifest(tmp_path, {"a.tar": (3, path.stat().st_size)}, {})
    assert "dataset.json says 3" in report(capsys, str(path))[1]["reasons"][0]
    assert main(["index", str(path)]) == 0
    capsys.readouterr()
    assert report(capsys, str(path))[0] == 0
    assert shards.read_index(path) == entries


def test_keys_twice_do_no_harm_but_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a.tar", good(4))
    write(tmp_path / "b.tar", good(2))
    code, found = report(capsys, str(tmp_path))
    assert code == 0
    assert found["notes"]["key that another sample has too"]["count"] == 2


def test_index_names_broken_shards_and_does_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "b"):
        shards.index_path(write(tmp_path / f"{name}.tar", good(4))).unlink()
    (tmp_path / "c.tar").write_bytes(b"junk")
    assert main(["index", str(tmp_path)]) == 1
    assert "c.tar: not a readable tar" in capsys.readouterr().err
    assert {name: row["samples"] for name, row in shards.read_manifest(tmp_path)["shards"].items()} == {
        "a.tar": 4, "b.tar": 4,
    }  # fmt: skip
    assert len(shards.read_index(tmp_path / "b.tar")) == 4
    assert main(["index", str(tmp_path / "a.tar")]) == 0
    assert len(shards.read_manifest(tmp_path)["shards"]) == 2, "what is known of other shards stays"


@pytest.mark.parametrize("command", ["index", "validate"])
def test_shards_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture, command: str) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "a folder without .tar files" in capsys.readouterr().err
    assert main([command, str(tmp_path / "a-{00000..00002}.tar")]) == 2
    assert "a-00000.tar: no such shard or folder" in capsys.readouterr().err


def test_tokenizer_of_shards_and_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a.tar", {
        "a": {"png": image(), "txt": b"zebra zebra", "json": b'{"captions": ["zebra stripes"]}'},
        "b": {"png": image(), "txt": b"caf\xe9"},
    })  # fmt: skip
    (tmp_path / "more.txt").write_text("giraffe\n\ngiraffe neck\n")
    words = [str(tmp_path / "a.tar"), str(tmp_path / "more.txt"), "--vocab-size", "540"]
    assert main(["tokenizer", *words, "--out", str(tmp_path / "tokens")]) == 0
    assert "learned from 4 different captions" in capsys.readouterr().out
    made = tokenizer.load(tmp_path / "tokens")
    assert len(made.ids("zebra giraffe")) < len("zebra giraffe")
    assert main(["tokenizer", *words[:2], "--vocab-size", "100", "--out", str(tmp_path / "x")]) == 2
    assert "vocab_size 100 is below" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["tokenizer", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "x")]) == 2
    assert "holds no caption" in capsys.readouterr().err


def test_near_duplicates_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture = sets.pixels(1, 200, 150)
    write(tmp_path / "a.tar", {
        "first": {"jpg": sets.encoded(picture), "txt": b"one two three"},
        "other": {"jpg": sets.encoded(sets.pixels(2)), "txt": b"one"},
    })  # fmt: skip
    write(tmp_path / "b.tar", {"copy": {"jpg": sets.encoded(picture, quality=50), "txt": b"two"}})
    tokenizer.train(["one two three four"], 520).save(tmp_path / "tokens")
    words = ["--near-duplicates", "--tokenizer", str(tmp_path / "tokens"), "--context-length", "4"]
    code, found = report(capsys, str(tmp_path), *words)
    assert code == 0
    alike = found["notes"]["picture that looks like an earlier one"]
    assert alike == {"count": 1, "examples": ["b.tar/copy and a.tar/first"]}
    tokens = dict(found["histograms"]["tokens a caption, start and end included"])
    assert sum(tokens.values()) == 3
    assert found["notes"]["caption longer than 4 tokens (its end is cut off)"]["count"] >= 1
    assert main(["validate", str(tmp_path), "--tokenizer", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("options", [[], ["--decode", "--near-duplicates"]])
def test_report_is_the_same_with_any_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str]
) -> None:
    sets.pairs(tmp_path, number=5)
    sets.pairs(tmp_path, number=2, prefix="again", first=8)
    (tmp_path / "train-00002.tar").write_bytes((tmp_path / "train-00002.tar").read_bytes()[:-3000])
    reports = [report(capsys, str(tmp_path), "--workers", number, *options) for number in ("1", "3")]
    assert reports[0] == reports[1]
    assert reports[0][0] == 1


def test_goes_on_after_sigkill(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, state = sets.pairs(tmp_path / "in", number=80), tmp_path / "state"
    words = ["validate", str(source), "--state", str(state), "--near-duplicates", "--json"]
    sets.kill_in_the_middle(words, state)
    assert main(words) == 0
    resumed = capsys.readouterr().out
    assert not state.exists(), "what was kept is only for an interrupted run"
    assert main(words) == 0
    assert capsys.readouterr().out == resumed


def test_names_and_captions_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, data in (("\udcff.png", image()), ("\udcff.json", b'{"caption": "a \\ud800"}'), ("empty.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    code, found = report(capsys, str(tmp_path))
    assert code == 1
    assert found["problems"]["caption holds half a surrogate pair, which is no text"]["count"] == 1
    assert main(["validate", str(tmp_path)]) == 1
    assert "\\udcff" in capsys.readouterr().out
    for command in ("dedup", "filter"):
        words = ["--min-words", "1"] if command == "filter" else []
        assert main([command, str(tmp_path), "--out", str(tmp_path / command), "--report-only", *words]) == 0
    assert main(["reshard", str(tmp_path), "--out", str(tmp_path / "out"), "--shuffle", "1"]) == 0
    assert main(["stats", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0


def test_checksums_are_kept_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sets.pairs(tmp_path / "in", number=2)
    out = tmp_path / "out"
    assert main(["reshard", str(folder), "--out", str(out), "--shard-size", "8"]) == 0
    listed = shards.listed_in(out)
    assert all(row[2] == shards.sha256_of(out / name) for name, row in listed.items()) and len(listed) == 2
    path = out / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"picture number")] ^= 32  # of another case: as long as before, and a good sample
    path.write_bytes(data)
    assert main(["validate", str(out)]) == 0
    assert main(["validate", str(out), "--decode"]) == 1
    assert "SHA-256 is not the one in dataset.json" in capsys.readouterr().out
    assert main(["index", str(path)]) == 0
    assert main(["validate", str(out), "--decode"]) == 0
    assert shards.listed_in(out)["train-00001.tar"] == listed["train-00001.tar"]

"""Pairs to shards: every source, every kind of bad row, equal bytes, and going on after a real SIGKILL."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.__main__ import main
from pretrain.data import format as shards
from tests.data_tools.pictures import read
from tests.data_tools.pictures import small as picture

ROOT = Path(__file__).resolve().parents[2]


def folder_of_pairs(folder: Path, number: int = 12) -> Path:
    for at in range(number):
        place = folder / f"part{at % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{at:04d}.jpg").write_bytes(picture(at, "JPEG"))
        (place / f"{at:04d}.txt").write_text(f"picture number {at}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_folder(tmp_path: Path) -> None:
    source = folder_of_pairs(tmp_path / "in")
    (source / "part0" / "0000.json").write_text('{"url": "here", "captions": ["another one"]}')
    assert main(["build", str(source), "--out", str(tmp_path / "out"), "--shard-size", "5"]) == 0
    manifest = shards.read_manifest(tmp_path / "out")
    assert {name: row["samples"] for name, row in manifest["shards"].items()} == {
        "train-00000.tar": 5, "train-00001.tar": 5, "train-00002.tar": 2,
    }  # fmt: skip
    found = read(tmp_path / "out")
    assert sorted(found) == [f"{n:08d}" for n in range(12)]
    first = found["00000000"]
    assert first["jpg"] == (source / "part0" / "0000.jpg").read_bytes(), "images are copied, not encoded again"
    assert first["txt"] == b"picture number 0"
    assert json.loads(first["json"]) == {"url": "here", "captions": ["picture number 0", "another one"]}
    assert set(found["00000001"]) == {"jpg", "txt"}


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t"), ("csv", ";")])
def test_table(tmp_path: Path, suffix: str, separator: str) -> None:
    folder_of_pairs(tmp_path / "in")
    lines = [separator.join(("path", "title", "score"))]
    lines += [separator.join((f"part{n % 2}/{n:04d}.jpg", f'"one{separator} two {n}"', str(n))) for n in range(12)]
    table = tmp_path / f"pairs.{suffix}"
    table.write_text("\n".join(lines) + "\n")
    words = ["--images", str(tmp_path / "in"), "--image-column", "path", "--caption-column", "title"]
    words += ["--separator", separator] if separator == ";" else []
    assert main(["build", str(table), "--out", str(tmp_path / "out"), *words]) == 0
    found = read(tmp_path / "out")
    assert found["00000007"]["txt"].decode() == f"one{separator} two 7"
    assert json.loads(found["00000007"]["json"]) == {"score": "7"}


def test_json_lines(tmp_path: Path) -> None:
    folder_of_pairs(tmp_path / "in", 2)
    table = tmp_path / "in" / "pairs.jsonl"
    rows = [{"image": "part0/0000.jpg", "captions": ["a", "b"], "id": 3}, {"image": "part1/0001.jpg", "caption": "c"}]
    table.write_text("\n\n".join(map(json.dumps, rows)))
    assert main(["build", str(table), "--out", str(tmp_path / "out"), "--prefix", "web"]) == 0
    found = read(tmp_path / "out", "web-*.tar")
    assert found["00000000"]["txt"] == b"a"
    assert json.loads(found["00000000"]["json"]) == {"captions": ["a", "b"], "id": 3}
    assert set(found["00000001"]) == {"jpg", "txt"}


def test_bad_rows_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = folder_of_pairs(tmp_path / "in")
    place = source / "part0"
    (place / "0000.txt").write_text("  \n")
    (place / "0002.txt").write_bytes(b"caf\xe9")
    (place / "0004.txt").unlink()
    (place / "0006.jpg").unlink()
    (place / "0008.jpg").write_bytes(b"no image at all")
    (place / "0010.json").write_text("{broken")
    words = ["build", str(source), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "6 of 12 rows are unusable, over --max-bad-fraction 0.01" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists(), "a failed build vouches for nothing"
    assert main([*words, "--max-bad-fraction", "0.5"]) == 0
    assert len(read(tmp_path / "out")) == 6
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["where"] for row in listed] == [
        f"part0/{name}" for name in ("0000.jpg", "0002.jpg", "0004.jpg", "0006.txt", "0008.jpg", "0010.jpg")
    ]
    reasons = ("caption is empty", "not UTF-8", "no caption file", "no image file", "header cannot be read", "not JSON")
    assert all(reason in row["reason"] for reason, row in zip(reasons, listed, strict=True))
    report = json.loads((tmp_path / "out" / "build-report.json").read_text())
    assert (report["rows"], report["samples"], report["bad"]) == (12, 6, 6)


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    table = tmp_path / "pairs.csv"
    table.write_bytes(b"image,caption\na.png,fine\nb.png,gone\na.png\n,no path\na.png,caf\xe9\na.png,\n")
    assert main(["build", str(table), "--out", str(tmp_path / "out"), "--max-bad-fraction", "0.9"]) == 0
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [(json.loads(line)["where"], json.loads(line)["reason"]) for line in lines] == [
        ("pairs.csv line 3", "image file is missing"),
        ("pairs.csv line 4", "row has another number of cells than the header"),
        ("pairs.csv line 5", "no image path under 'image'"),
        ("pairs.csv line 6", "row is not UTF-8"),
        ("pairs.csv line 7", "caption is empty"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "sentence", "code"),
    [
        ("nowhere", None, "no such file or folder", 2),
        ("x.xlsx", "", "unknown kind '.xlsx'; say what it is with --kind", 2),
        ("t.csv", "picture,caption\na,b\n", "no column 'image'", 2),
        ("t.csv", "image,caption\n", "nothing to build", 2),
        ("t.csv", "image,caption\na.png,b\n", "none of 1 rows", 1),
    ],
)
def test_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, text: str | None, sentence: str, code: int
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["build", str(tmp_path / name), "--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_out_that_is_a_file_and_numbers_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = folder_of_pairs(tmp_path / "in", 2)
    (tmp_path / "file").write_text("")
    assert main(["build", str(source), "--out", str(tmp_path / "file")]) == 2
    assert "name a folder" in capsys.readouterr().err
    for option in (["--shard-size", "0"], ["--validation-fraction", "1.5"]):
        with pytest.raises(SystemExit) as left:
            main(["build", str(source), "--out", str(tmp_path / "out"), *option])
        assert left.value.code == 2


def test_validation_is_split_by_key_and_output_is_deterministic(tmp_path: Path) -> None:
    source = folder_of_pairs(tmp_path / "in", 60)
    for name in ("one", "two"):
        words = ["--validation-fraction", "0.25", "--shard-size", "7"]
        assert main(["build", str(source), "--out", str(tmp_path / name), *words]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    train, held = (set(read(tmp_path / "one", f"{split}-*.tar")) for split in ("train", "validation"))
    assert not train & held
    assert len(train | held) == 60
    assert 6 <= len(held) <= 24


def test_only_what_changed_is_written_again(tmp_path: Path) -> None:
    source, out = folder_of_pairs(tmp_path / "in", 30), tmp_path / "out"
    words = ["build", str(source), "--out", str(out), "--shard-size", "10"]
    assert main(words) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert main(words) == 0
    assert before == {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}, "nothing changed, nothing is written"
    (source / "part1" / "0001.txt").write_text("another caption")  # row 15, in the second shard
    assert main(words) == 0
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert [name for name in sorted(before) if before[name] == after[name]] == ["train-00000.tar"]
    folder_of_pairs(source, 33)
    (out / "train-00001.tar").write_bytes(b"damaged")
    assert main(words) == 0
    assert main(["build", str(source), "--out", str(tmp_path / "fresh"), "--shard-size", "10"]) == 0
    assert contents(out) == contents(tmp_path / "fresh"), "a mended and grown build equals a fresh one"
    assert main([*words[:-1], "40"]) == 0
    assert [p.name for p in out.glob("*.tar")] == ["train-00000.tar"], "shards of the longer list are gone"


def test_goes_on_after_sigkill(tmp_path: Path) -> None:
    source, out = folder_of_pairs(tmp_path / "in", 600), tmp_path / "out"
    words = [str(source), "--shard-size", "5", "--validation-fraction", "0.1"]
    command = [sys.executable, "-m", "data_tools", "build", *words, "--out", str(out)]
    kept: dict[str, int] = {}
    for wanted in (3, 20):
        run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while len(list(out.glob("*.tar"))) < wanted + len(kept) and run.poll() is None:
            time.sleep(0.001)
        time.sleep(random.random() / 20)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (out / "dataset.json").exists(), "killed too late to prove anything"
        for path in out.glob("*.tar"):
            assert len(shards.scan(path)) == 5 or path.name.startswith("validation"), "a final name is a whole shard"
        now = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
        assert all(now[name] == when for name, when in kept.items()), "finished shards are kept"
        kept = {name: now[name] for name in now if (out / ".build" / f"{name}.json").exists()}
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert main(["build", *words, "--out", str(tmp_path / "whole")]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert not list(out.glob(".*.part"))


def test_a_picture_named_twice_is_two_samples(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\na.png,two\na.png,one\n")
    assert main(["build", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "out")]) == 0
    assert [members["txt"] for members in read(tmp_path / "out").values()] == [b"one", b"two", b"one"]


def test_a_short_last_shard_that_grows_by_a_bad_row_is_written_again(tmp_path: Path) -> None:
    source, out = folder_of_pairs(tmp_path / "in", 12), tmp_path / "out"
    words = ["--shard-size", "5", "--max-bad-fraction", "0.5"]
    assert main(["build", str(source), "--out", str(out), *words]) == 0
    (source / "part1" / "9999.jpg").write_bytes(b"no image")
    (source / "part1" / "9999.txt").write_text("words")
    assert main(["build", str(source), "--out", str(out), *words]) == 0
    assert main(["build", str(source), "--out", str(tmp_path / "fresh"), *words]) == 0
    assert contents(out) == contents(tmp_path / "fresh")
    assert json.loads((out / "build-report.json").read_text())["bad"] == 1


def test_held_out_shards_go_when_nothing_is_held_out_any_more(tmp_path: Path) -> None:
    source, out = folder_of_pairs(tmp_path / "in", 40), tmp_path / "out"
    words = ["build", str(source), "--out", str(out)]
    assert main([*words, "--validation-fraction", "0.3"]) == 0
    assert list(out.glob("validation-*.tar"))
    assert main(words) == 0
    assert not list(out.glob("validation-*"))
    assert len(read(out)) == 40


def test_two_builds_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from data_tools._folder import claim

    source = folder_of_pairs(tmp_path / "in", 2)
    with claim(tmp_path / "out"):
        assert main(["build", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "another build is writing there" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    source = folder_of_pairs(tmp_path / "in", 2)
    opened = open
    monkeypatch.setattr(
        "builtins.open", lambda f, *a, **k: opened("/dev/full" if str(f).endswith(".part") else f, *a, **k)
    )
    assert main(["build", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err

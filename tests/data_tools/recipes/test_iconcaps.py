"""The IconCaps recipe on tiny packages laid out like the real ones: no network, the real renderer."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from data_tools import _npm
from data_tools.__main__ import main
from data_tools._cache import cache_folder
from data_tools.recipes import iconcaps
from data_tools.recipes._draw import render
from data_tools.recipes._emoji import NAMES, STYLES, Concept, match, slugs
from pretrain.data import format as shards
from pretrain.data import tokenizer

ROOT = Path(__file__).resolve().parents[3]
BIRDS, TOOLS = 24, 20  # one subgroup with more and one with just enough members for a few-shot class
pytest.importorskip("resvg_py")


def concepts() -> list[dict]:
    """Return rows as emojibase writes them: two subgroups, a flag, and one without any group."""
    rows = [{"label": f"bird {n}", "hexcode": f"1F4{n:02X}", "tags": ["wing", f"song {n}"]} for n in range(BIRDS)]
    rows = [{**row, "group": 3, "subgroup": 40} for row in rows]
    rows += [{"label": f"tool {n}", "hexcode": f"1F5{n:02X}-FE0F", "group": 7, "subgroup": 80} for n in range(TOOLS)]
    rows.append({"label": "flag: Nowhere", "hexcode": "1F1F3-1F1F4", "tags": ["NO"], "group": 9, "subgroup": 95})
    rows.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    return rows


def package(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def fill(cache: Path) -> Path:
    """Write all eight packages; noto-v1 knows fewer concepts and no code points, the 3-D style has bitmaps."""
    cache.mkdir(parents=True, exist_ok=True)
    messages = {
        "groups": [
            {"order": 3, "message": "animals"},
            {"order": 7, "message": "objects"},
            {"order": 9, "message": "flags"},
        ],
        "subgroups": [
            {"order": 40, "key": "animal-bird", "message": "birds"},
            {"order": 80, "key": "tool", "message": "tools / things & co"},
            {"order": 95, "key": "country-flag", "message": "country flags"},
        ],
    }
    names = {"en/data.json": concepts(), "en/messages.json": messages}
    package(cache / NAMES.file, {name: json.dumps(tree).encode() for name, tree in names.items()})
    for hue, style in enumerate(STYLES):
        rows = concepts()[:40] if style.name == "noto-v1" else concepts()
        if style.name == "fluent-emoji-3d":
            files = {f"assets/{row['hexcode'].lower()}.webp": bitmap(at) for at, row in enumerate(rows)}
        else:
            icons = {slugs(row["label"])[0]: {"body": circle(at, hue)} for at, row in enumerate(rows)}
            chars = {} if style.name == "noto-v1" else {
                row["hexcode"].lower().removesuffix("-fe0f"): slugs(row["label"])[0] for row in rows
            }  # fmt: skip
            files = {"icons.json": json.dumps({"icons": icons, "width": 32, "height": 32}).encode()}
            files["chars.json"] = json.dumps(chars).encode()
        package(cache / style.package.file, files)
    return cache


def circle(at: int, hue: int) -> str:
    return f'<circle cx="16" cy="16" r="{4 + at % 12}" fill="rgb({at * 5},{hue * 30},90)"/>'


def bitmap(at: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (16, 16), (at * 5, 200, 0, 128)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def build(out: Path, cache: Path, *more: str) -> int:
    words = ["--size", "16", "--vocab-size", "600", "--shard-size", "64", "--workers", "1"]
    return main(["build", "--recipe", "iconcaps", "--out", str(out), "--cache", str(cache), *words, *more])


def read(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    found = {}
    for path in sorted(folder.glob(f"{split}-0*.tar")):
        with open(path, "rb") as file:
            found.update({e.key: shards.read_members(file, e) for e in shards.read_index(path)})
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("icons")
    assert build(folder / "out", fill(folder / "cache")) == 0
    return folder


def test_splits_do_not_leak(built: Path) -> None:
    unseen = {row["hexcode"] for row in concepts() if Concept(row["hexcode"], "", (), "", "", "").is_unseen}
    assert unseen, "the fixture needs an unseen concept"
    rows = {split: [json.loads(m["json"]) for m in read(built / "out", split).values()] for split in
            ("train", "validation", "test", "fewshot-train", "fewshot-validation", "fewshot-test",
             "shift-train", "shift-validation", "shift-test")}  # fmt: skip
    assert {row["style"] for row in rows["train"]} == {style.name for style in STYLES if style.role == "train"}
    assert not unseen & {row["hexcode"] for row in rows["train"]}
    assert all(row["seen"] for row in rows["train"])
    assert {row["style"] for row in rows["validation"]} == {"noto-v1"}
    assert {row["style"] for row in rows["test"]} == {"noto"}
    assert unseen <= {row["hexcode"] for row in rows["test"]}
    assert not any(row["label"].startswith("flag:") for split in rows.values() for row in split)
    few = [{row["hexcode"] for row in rows[f"fewshot-{part}"]} for part in ("train", "validation", "test")]
    assert [len(part) for part in few] == [27, 9, 8], "60/20/20 inside each class"
    assert len(set.union(*few)) == BIRDS + TOOLS, "no concept on two sides"
    for part in ("train", "validation", "test"):
        classes = {row["hexcode"]: row["class"] for row in rows[f"fewshot-{part}"]}
        shifted = {row["hexcode"]: row["class"] for row in rows[f"shift-{part}"]}
        assert {row["style"] for row in rows[f"shift-{part}"]} == {"noto-v1"}
        assert shifted and shifted.items() <= classes.items(), "the same concepts on the same side"


def test_records_and_classes(built: Path) -> None:
    out = built / "out"
    classes = json.loads((out / "classes.json").read_text())
    assert len(classes) == BIRDS + TOOLS + 1
    assert {row["group"] for row in classes} == {"seen", "unseen"}
    for key, members in {**read(out, "test"), **read(out, "validation"), **read(out, "train")}.items():
        record = json.loads(members["json"])
        assert key == f"{record['style']}-{record['hexcode'].lower()}"
        assert members["txt"].decode() == record["captions"][0] == record["label"]
        if "class" in record:
            assert classes[record["class"]]["hexcode"] == record["hexcode"]
            assert (classes[record["class"]]["group"] == "seen") == record["seen"]
        with Image.open(io.BytesIO(members["png"])) as image:
            assert (image.size, image.mode) == ((16, 16), "RGB")
    assert json.loads((out / "fewshot-classes.json").read_text()) == [
        {"name": "birds"}, {"name": "tools or things and co"},
    ]  # fmt: skip
    assert {json.loads(m["json"])["name"] for m in read(out, "fewshot-test").values()} == {
        "birds", "tools or things and co",
    }  # fmt: skip


def test_what_lies_beside_the_shards(built: Path) -> None:
    out = built / "out"
    meta = shards.read_manifest(out)["meta"]
    assert {name: row["pictures"] for name, row in meta["styles"].items()} == {
        style.name: 40 if style.name == "noto-v1" else 46 for style in STYLES
    }
    assert all(style.package.name in (out / "LICENSES.md").read_text() for style in STYLES)
    assert 514 < tokenizer.load(out / "tokenizer").vocab_size <= 600
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 700
    assert main(["validate", str(out), "--decode"]) == 0


def test_again_costs_nothing_and_elsewhere_gives_equal_bytes(built: Path, tmp_path: Path, capsys) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (built / "out").iterdir()}
    assert build(built / "out", built / "cache") == 0
    assert "up to date" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in (built / "out").iterdir()}
    assert build(tmp_path / "two", fill(tmp_path / "cache"), "--workers", "2") == 0
    names = sorted(p.name for p in (tmp_path / "two").iterdir() if p.is_file())
    assert names == sorted(p.name for p in (built / "out").iterdir() if p.is_file())
    for name in names:
        assert (built / "out" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_other_sizes_leave_no_old_shards(built: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "out", built / "cache", "--shard-size", "16") == 0
    assert build(tmp_path / "out", built / "cache") == 0
    assert set(shards.read_manifest(tmp_path / "out")["shards"]) == {p.name for p in (tmp_path / "out").glob("*.tar")}


def test_goes_on_after_sigkill(built: Path, tmp_path: Path) -> None:
    cache, out = fill(tmp_path / "cache"), tmp_path / "out"
    words = ["--size", "16", "--vocab-size", "600", "--shard-size", "64", "--workers", "2", "--cache", str(cache)]
    command = [sys.executable, "-m", "data_tools", "build", "--recipe", "iconcaps", "--out", str(out), *words]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(list((cache / "rendered").glob("*.idx"))) < 2 and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    drawn = {p: p.stat().st_mtime_ns for p in (cache / "rendered").glob("*.idx")}
    assert 2 <= len(drawn) < len(STYLES), "killed too early or too late to prove anything"
    assert build(out, cache) == 0
    assert all(p.stat().st_mtime_ns == when for p, when in drawn.items()), "styles that were drawn are kept"
    for path in (built / "out").glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_without_npm_there_is_a_remedy(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cache = fill(tmp_path / "cache")
    (cache / NAMES.file).write_bytes((cache / NAMES.file).read_bytes()[:-9])  # cut off: as good as missing
    assert build(tmp_path / "out", cache) == 1
    said = capsys.readouterr().err
    assert "npm was not found" in said
    assert "apt-get install npm" in said
    assert f"put these 1 files into {cache}" in said
    assert NAMES.file in said


def test_npm_that_fails_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}/bin")
    assert build(tmp_path / "out", tmp_path / "cache") == 1
    said = capsys.readouterr().err
    assert "could not fetch emojibase-data@17.0.0 (npm error code ENOTFOUND)" in said
    assert not list((tmp_path / "cache").glob("*.tgz"))


def test_npm_that_works_fills_the_cache(tmp_path: Path, monkeypatch) -> None:
    store = fill(tmp_path / "store")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\ncp "{store / NAMES.file}" .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}/bin{os.pathsep}/usr/bin")
    path = _npm.fetch([NAMES], tmp_path / "cache")[NAMES]
    assert path.read_bytes() == (store / NAMES.file).read_bytes()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [NAMES.file]


def test_cache_is_named_by_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("DIPTYCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/diptych/downloads")


def test_matching_prefers_the_strict_form() -> None:
    def named(hexcode: str, label: str) -> Concept:
        return Concept(hexcode, label, (), "", "", "")

    icons = {"icons": {key: {} for key in ("cat-face", "bear-face", "womanshat", "cricket-game", "star")},
             "aliases": {"cricket": {"parent": "cricket-game"}, "glow": {"parent": "star", "hFlip": True}}}  # fmt: skip
    rows = [named("A", "cat"), named("B", "cat face"), named("C", "bear"), named("D", "woman\u2019s hat"),
            named("E", "cricket"), named("F", "cricket game"), named("1F31F-FE0F", "odd"),
            named("G", "glow")]  # fmt: skip
    assert match(icons, {"1f31f": "star"}, rows) == {
        "B": "cat-face", "C": "bear-face", "D": "womanshat", "F": "cricket-game", "1F31F-FE0F": "star",
    }  # fmt: skip


def test_drawings_are_on_white_and_not_stretched() -> None:
    wide = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -8 32 32"><rect width="32" height="16"/></svg>'
    with Image.open(io.BytesIO(render(wide, 32))) as image:
        assert image.getpixel((16, 2)) == (255, 255, 255)
        assert image.getpixel((16, 16)) == (0, 0, 0)
    with Image.open(io.BytesIO(render(bitmap(0), 8))) as image:
        assert image.getpixel((4, 4)) == pytest.approx((127, 227, 127), abs=1)


def test_captions_start_with_the_name_and_are_different() -> None:
    sentences = iconcaps.captions(
        Concept("1F426", "bird", ("wing", "tweet", "bird"), "animals", "birds", "animal-bird")
    )
    assert sentences[0] == "bird"
    assert len(sentences) == len(set(sentences))
    assert any("wing" in sentence for sentence in sentences)
    assert iconcaps.captions(Concept("1F1E6", "letter", (), "", "", ""))[0] == "letter"

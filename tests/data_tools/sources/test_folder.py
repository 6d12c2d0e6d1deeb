"""Folders: img2dataset's `files` layout, rows without words, which kind a folder is."""

import json
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools._pairs import source_of
from pretrain.config import ConfigError
from tests.data_tools.pictures import read, small


def test_img2dataset_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "00000").mkdir(parents=True)
    for at in range(3):
        stem = source / "00000" / f"{at:09d}"
        stem.with_suffix(".jpg").write_bytes(small(at, "JPEG"))
        stem.with_suffix(".txt").write_text(f"caption {at}")
        meta = {"caption": None if at else "caption 0", "url": f"u{at}", "status": "success"}
        stem.with_suffix(".json").write_text(json.dumps(meta))
    (source / "00000.parquet").write_bytes(b"what became of the URLs")
    (source / "00000_stats.json").write_text("{}")
    assert main(["build", str(source), "--out", str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out")
    assert [members["txt"] for members in found.values()] == [b"caption 0", b"caption 1", b"caption 2"]
    assert json.loads(found["00000002"]["json"])["url"] == "u2"


def test_pictures_without_words(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(small(1))
    assert main(["build", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert main(["build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--allow-wordless"]) == 0
    assert read(tmp_path / "out") == {"00000000": {"png": small(1)}}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg", "a.txt", "meta.parquet"], "folder"),
        (["0.parquet", "1.parquet", "README.md"], "parquet"),
        (["0.tar", "0.parquet", "0_stats.json"], "webdataset"),
        (["sub/a.jpg", "0.parquet"], "folder"),
    ],
)
def test_kind_of_a_folder(tmp_path: Path, names: list[str], kind: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert source_of(tmp_path, None).__name__ == f"data_tools.sources.{kind}"
    assert source_of(tmp_path, "jsonl").__name__ == "data_tools.sources.jsonl"


def test_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "x.zip").touch()
    with pytest.raises(ConfigError, match=r"unknown kind '\.zip'; say what it is with --kind"):
        source_of(tmp_path / "x.zip", None)

"""Parquet: bytes, Hugging Face's struct, paths; cells that JSON does not know; img2dataset's failed rows."""

import datetime
import json
from pathlib import Path

import pytest

from data_tools.__main__ import main
from tests.data_tools.pictures import read, small

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: dict[str, list], *, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def build(source: Path, out: Path, *words: str) -> dict[str, dict[str, bytes]]:
    assert main(["build", str(source), "--out", str(out), *words]) == 0
    return read(out)


def test_hugging_face(tmp_path: Path) -> None:
    (tmp_path / "hf" / "lies").mkdir(parents=True)
    (tmp_path / "hf" / "lies" / "7.png").write_bytes(small(7))
    (tmp_path / "hf" / "lies").rename(tmp_path / "lies")
    for part in range(2):
        images = [{"bytes": small(part * 10 + at), "path": f"{at}.png"} for at in range(9)]
        images[7] = {"bytes": None, "path": "../lies/7.png"}
        captions = [[f"{part} {at}", "other"] for at in range(9)]
        columns = {"image": images, "caption": captions, "score": [0.5] * 8 + [float("nan")]}
        write(tmp_path / "hf" / f"train-{part:05d}-of-00002.parquet", columns)
    found = build(tmp_path / "hf", tmp_path / "out", "--shard-size", "5")
    assert len(found) == 18
    assert found["00000007"]["png"] == small(7)
    assert found["00000012"]["png"] == small(13)
    assert found["00000012"]["txt"] == b"1 3"
    assert json.loads(found["00000012"]["json"]) == {"score": 0.5, "captions": ["1 3", "other"]}
    assert json.loads(found["00000008"]["json"])["score"] is None


def test_bytes_of_img2dataset(tmp_path: Path) -> None:
    columns = {
        "key": ["000", "001", "002"],
        "jpg": [small(0, "JPEG"), None, small(2, "JPEG")],
        "txt": ["zero", None, "two"],
        "caption": ["zero", "one", "two"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
    }
    found = build(write(tmp_path / "p" / "00000.parquet", columns).parent, tmp_path / "out")
    assert sorted(found) == ["00000000", "00000002"], "what was never there is no bad row"
    assert found["00000002"]["jpg"] == small(2, "JPEG")
    assert found["00000002"]["txt"] == b"two"
    assert json.loads(found["00000002"]["json"])["key"] == "002"


def test_paths_times_and_wordless_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(small(1))
    columns = {"picture": ["a.png"], "when": [datetime.datetime(2020, 1, 2)], "raw": [b"\0\1"], "box": [{"x": 1}]}
    source = write(tmp_path / "t.parquet", columns)
    found = build(source, tmp_path / "out", "--image-column", "picture", "--allow-wordless")
    assert json.loads(found["00000000"]["json"]) == {"when": "2020-01-02T00:00:00", "raw": "AAE=", "box": {"x": 1}}
    assert "txt" not in found["00000000"]


def test_resumes_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    columns = {"image": [small(at) for at in range(9)], "caption": [f"c{at}" for at in range(9)]}
    source = write(tmp_path / "t.parquet", columns)
    build(source, tmp_path / "out", "--shard-size", "3")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    columns["caption"][4] = "changed"
    write(source, columns)
    build(source, tmp_path / "out", "--shard-size", "3")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert [name for name in sorted(before) if before[name] == after[name]] == ["train-00000.tar"]
    assert main(["build", str(source), "--out", str(tmp_path / "x"), "--image-column", "imag"]) == 2
    assert "no column 'imag'. Did you mean 'image'" in capsys.readouterr().err
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no PAR1")
    assert main(["build", str(tmp_path / "bad.parquet"), "--out", str(tmp_path / "x")]) == 1
    assert "not a readable parquet file" in capsys.readouterr().err

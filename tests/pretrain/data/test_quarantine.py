"""The list of bad samples is exact over ranks and resumes, and its limit stops all ranks in the same call."""

import json
from pathlib import Path

import pytest

from pretrain import dist
from pretrain.data.quarantine import Quarantine, TooManyBad


def line(key: str, epoch: int = 0) -> dict[str, str]:
    return {"epoch": str(epoch), "shard": "a.tar", "key": key, "reason": "why"}


def read(path: Path) -> list[str]:
    return [json.loads(row)["key"] for row in path.read_text().splitlines()]


def test_counts_once_over_resumes(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path, 0.5)
    first.add([line("x"), line("y")])
    first.sync(seen=200)
    first.add([line("x", epoch=1)])
    first.sync(seen=400)
    with open(path, "a") as file:
        file.write('{"epoch": "1", "sha')  # the run died here
    again = Quarantine(path, 0.5)
    again.add([line("y"), line("x", epoch=1), line("z")])
    again.sync(seen=400)
    assert read(path) == ["x", "y", "x", "z"] and again.count == 4


def test_nothing_bad_writes_nothing(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.0)
    quarantine.sync(seen=10_000)
    assert not (tmp_path / "q.jsonl").exists()


def test_the_limit(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.01)
    quarantine.add([line("x"), line("y")])
    quarantine.sync(seen=50)  # two of fifty say little
    quarantine.sync(seen=200)  # exactly 1 %
    with pytest.raises(TooManyBad, match=r"2 of 199 samples are unusable, over data.max_bad_fraction=0.01; .*q.jsonl"):
        quarantine.sync(seen=199)


def stop_together(path: str) -> tuple[str, int]:
    quarantine = Quarantine(path, 0.02)
    quarantine.sync(seen=100)
    if dist.rank() == 1:
        quarantine.add([line("x"), line("y")])
    quarantine.sync(seen=200)
    quarantine.add([line("y"), line(f"z{dist.rank()}")])
    try:
        quarantine.sync(seen=199)
    except TooManyBad as error:
        return str(error), quarantine.count
    return "", quarantine.count


def test_ranks_stop_together(ranks, tmp_path):
    path = tmp_path / "q.jsonl"
    answers = ranks.run(2, stop_together, str(path))
    assert answers[0] == answers[1] and "4 of 199" in answers[0][0]
    assert sorted(read(path)) == ["x", "y", "z0", "z1"]

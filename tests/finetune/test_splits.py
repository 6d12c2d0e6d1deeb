"""Few-shot draws: balanced, nested, a function of seed and keys; one's own folders; what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from finetune import splits
from finetune.tasks import few_shot
from pretrain.config import ConfigError
from pretrain.data import format
from tests import tiny


def samples(counts: list[int]) -> list[splits.Sample]:
    return [splits.Sample(f"k{c}-{i}", c, f"n{c}", lambda: {}) for c, n in enumerate(counts) for i in range(n)]


@pytest.mark.check("few-shot", 1)
def test_draw_is_balanced_nested_and_deterministic():
    pool = samples([9, 5, 2])
    four = splits.draw(pool, 4, seed=1)
    assert Counter(s.target for s in four) == {0: 4, 1: 4, 2: 2}  # a small class keeps all
    assert four == splits.draw(list(reversed(pool)), 4, seed=1)
    assert {s.key for s in splits.draw(pool, 2, seed=1)} <= {s.key for s in four}
    assert {s.key for s in four} != {s.key for s in splits.draw(pool, 4, seed=2)}
    assert [s.target for s in four] != sorted(s.target for s in four)  # classes are mixed


def test_hold_out_leaves_something_to_train_on():
    rest, held = splits.hold_out(samples([9, 5, 2]), 2, seed=1)
    assert Counter(s.target for s in held) == {0: 2, 1: 2}
    assert len(rest) + len(held) == 16 and not {s.key for s in rest} & {s.key for s in held}


def task(data, **keys) -> few_shot.Task:
    return few_shot.Task(few_shot.Config(name="few_shot", data=str(data), **keys))


@pytest.mark.check("few-shot", 4)
def test_a_folder_of_class_folders(tmp_path):
    found = task(tiny.class_folders(tmp_path / "mine"), shots=2).prepare(tmp_path / "run")
    assert found.names == ["green shape", "blue shape", "red shape"] or found.names == sorted(found.names)
    assert found.samples == {"train": 6, "validation": 6, "test": 15}
    rows = [r for path in found.train for r in json_members(path)]
    assert Counter(r["name"] for r in rows) == dict.fromkeys(found.names, 2)
    validation = [r["source"] for path in found.validation for r in json_members(path)]
    assert not {r["source"] for r in rows} & set(validation)


def json_members(path) -> list[dict]:
    with open(path, "rb") as file:
        return [json.loads(format.read_members(file, entry)["json"]) for entry in format.read_index(path)]


@pytest.mark.check("few-shot", 1)
def test_a_second_start_finds_the_same_bytes(tmp_path):
    data = tiny.class_folders(tmp_path / "mine")
    first = task(data, shots=2).prepare(tmp_path / "a")
    before = [Path(path).read_bytes() for path in first.train]
    assert task(data, shots=2).prepare(tmp_path / "a") == first
    again = task(data, shots=2).prepare(tmp_path / "b")
    assert [Path(path).read_bytes() for path in again.train] == before
    assert task(data, shots=1).prepare(tmp_path / "a").samples["train"] == 3  # another draw is another draw


def test_shards_that_another_draw_has_overwritten_are_not_those_of_the_first(tmp_path, monkeypatch):
    data = tiny.class_folders(tmp_path / "mine")
    first = task(data, shots=2).prepare(tmp_path / "run")
    before = Path(first.train[0]).read_bytes()
    write = splits.write

    def dies(samples, folder, split):
        if split == "test":
            raise KeyboardInterrupt
        return write(samples, folder, split)

    monkeypatch.setattr(splits, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        task(data, shots=1).prepare(tmp_path / "run")
    monkeypatch.undo()
    assert task(data, shots=2).prepare(tmp_path / "run") == first
    assert Path(first.train[0]).read_bytes() == before


def shard(path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with format.ShardWriter(path) as writer:
        for number, row in enumerate(rows):
            writer.add(f"s{number}", {"png": b"pixels", "json": json.dumps(row).encode()})


def test_shards_by_folder_and_by_pattern(tmp_path):
    rows = [{"class": c, "name": f"n{c}"} for c in (0, 1, 0, 1)]
    for split in ("train", "validation", "test"):
        shard(tmp_path / f"{split}-00000.tar", rows)
    by_folder = task(tmp_path, shots=1).prepare(tmp_path / "a")
    by_pattern = task(tmp_path / "{split}-*.tar", shots=1).prepare(tmp_path / "b")
    assert by_folder.names == by_pattern.names == ["n0", "n1"]
    assert by_folder.samples == by_pattern.samples == {"train": 2, "validation": 2, "test": 4}


@pytest.mark.parametrize(
    "train, test, message",
    [
        ([{"class": 0, "name": "a"}, {"class": 0, "name": "b"}], [], "has no test split"),
        ([{"class": 0, "name": "a"}, {"class": 0, "name": "b"}], [{"class": 0, "name": "a"}], "is called 'a' and 'b'"),
        ([{"class": 0, "name": "a"}, {"class": 2, "name": "b"}], [{"class": 0, "name": "a"}], "0 .. 1 without gaps"),
        ([{"class": 0, "name": "a"}, {"class": 1, "name": "b"}], [{"class": 2, "name": "c"}], "train has none"),
        ([{"class": 0, "name": "a"}, {"class": 1, "name": "b"}], [{"class": -1, "name": "b"}], "train has none"),
        ([{"class": 1, "name": "a"}, {"class": 2, "name": "b"}], [{"class": 0, "name": "c"}], r"\(c\), train has none"),
        ([{"class": 0, "name": "a"}, {"class": 1, "name": "b"}], [{"class": 0, "name": "b"}], "train calls it 'a'"),
        ([{"class": "0", "name": "a"}], [{"class": 0, "name": "a"}], "must hold"),
        ([{"class": 0}], [{"class": 0, "name": "a"}], "must hold"),
    ],
)
def test_refusals(tmp_path, train, test, message):
    for split, rows in (("train", train), ("test", test)):
        if rows:
            shard(tmp_path / f"{split}-00000.tar", rows)
    with pytest.raises(ConfigError, match=message):
        task(tmp_path).prepare(tmp_path / "run")


def test_a_wrong_path_says_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match="train/CLASS"):
        task(tmp_path / "nowhere").prepare(tmp_path / "run")
    with pytest.raises(ConfigError, match="has no train split"):
        task(tmp_path).prepare(tmp_path / "run")

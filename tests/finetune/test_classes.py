"""Halves of the classes, shifts, whole training sets; test splits that are shards already are not written again."""

from collections import Counter
from pathlib import Path

import pytest

from finetune import splits
from finetune.tasks import classification, few_shot
from pretrain.config import ConfigError
from pretrain.report import scores
from tests import tiny
from tests.finetune.test_main import fine_tune, recipe_file
from tests.finetune.test_sources import bare
from tests.finetune.test_splits import json_members, shard


def task(data, **keys) -> few_shot.Task:
    return few_shot.Task(few_shot.Config(name="few_shot", data=str(data), shots=2, **keys))


@pytest.fixture
def five(tmp_path):
    """Shards of five classes."""
    rows = [{"class": c, "name": f"n{c}"} for c in range(5) for _ in range(6)]
    for split in ("train", "validation", "test"):
        shard(tmp_path / "five" / f"{split}-00000.tar", rows)
    return tmp_path / "five"


def counted(paths) -> Counter:
    return Counter((row["class"], row["name"]) for path in paths for row in json_members(path))


@pytest.mark.check("few-shot", 3)
def test_base_is_the_first_half_and_the_rest_is_scored_as_new(five, tmp_path):
    found = task(five, classes="base").prepare(tmp_path / "base")
    assert found.names == ["n0", "n1", "n2"] and set(found.more) == {"new"}
    assert counted(found.train) == {(c, f"n{c}"): 2 for c in range(3)}
    assert counted(found.test) == {(c, f"n{c}"): 6 for c in range(3)}
    assert found.more["new"].names == ["n3", "n4"]
    assert counted(found.more["new"].shards) == {(c, f"n{c + 3}"): 6 for c in range(2)}
    assert task(five, classes="base").prepare(tmp_path / "base") == found
    new = task(five, classes="new").prepare(tmp_path / "new")
    assert new.names == ["n3", "n4"] and not new.more
    assert counted(new.train) == {(c, f"n{c + 3}"): 2 for c in range(2)}


def test_all_classes_of_shards_are_scored_where_they_lie(five, tmp_path):
    found = task(five).prepare(tmp_path / "all")
    assert found.test == [str(five / "test-00000.tar")] and found.samples["test"] == 30
    assert not (tmp_path / "all" / "test-00000.tar").exists()


def test_too_few_classes_for_halves(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.classes: 3 classes have no two halves"):
        task(tiny.class_folders(tmp_path / "mine"), classes="base").prepare(tmp_path / "run")


def test_a_shift_is_matched_by_class_names(five, tmp_path):
    rows = [{"class": c, "name": f"n{4 - c}"} for c in range(2)]  # n4 and n3, numbered anew
    for split in ("train", "test"):
        shard(tmp_path / "other" / f"{split}-00000.tar", rows)
    found = task(five, shift=str(tmp_path / "other")).prepare(tmp_path / "run")
    assert counted(found.more["shift"].shards) == {(4, "n4"): 1, (3, "n3"): 1}
    assert found.more["shift"].names == found.names
    with pytest.raises(ConfigError, match=r"no picture of a class of task\.data"):
        task(five, classes="base", shift=str(tmp_path / "other")).prepare(tmp_path / "base")


def test_a_shift_needs_nothing_to_train_on_and_is_scored_as_a_whole(five, tmp_path):
    shard(tmp_path / "other" / "test-00000.tar", [{"class": 0, "name": "n2"}])
    found = task(five, shift=str(tmp_path / "other")).prepare(tmp_path / "run")
    assert counted(found.more["shift"].shards) == {(2, "n2"): 1}
    mine, others = tiny.class_folders(tmp_path / "mine"), bare(tmp_path / "others")
    found = task(mine, shift=str(others)).prepare(tmp_path / "whole")
    assert counted(found.more["shift"].shards) == {(c, name): 10 for c, name in enumerate(found.names)}
    (others / "list.csv").write_text("path,class\n" + "".join(f"{p},{p.parent.name}\n" for p in others.glob("*/*")))
    again = task(mine, shift=str(others / "list.csv")).prepare(tmp_path / "table")
    assert counted(again.more["shift"].shards) == counted(found.more["shift"].shards)
    with pytest.raises(ConfigError, match="has no test split"):
        task(mine, shift=str(tmp_path / "nowhere-{split}.tar")).prepare(tmp_path / "none")


def test_a_whole_training_set_with_a_tenth_held_out(tmp_path):
    data = tiny.class_folders(tmp_path / "mine", train=20)
    section = classification.Config(name="classification", data=str(data))
    found = classification.Task(section).prepare(tmp_path / "run")
    assert found.samples == {"train": 54, "validation": 6, "test": 15}
    cut = classification.Task(section.model_copy(update={"data": str(bare(tmp_path / "bare"))}))
    assert cut.prepare(tmp_path / "again").samples == {"train": 15, "validation": 6, "test": 9}


def test_splits_whose_shards_are_gone_are_made_again(five, tmp_path):
    found = task(five).prepare(tmp_path / "run")
    before = Path(found.train[0]).read_bytes()
    (tmp_path / "run" / "train-00000.tar").unlink()
    assert task(five).prepare(tmp_path / "run") == found
    assert Path(found.train[0]).read_bytes() == before


def test_a_prompt_that_was_learned_on_the_base_half_is_scored_on_the_new_one(tmp_path, ranks):
    data = tiny.class_folders(tmp_path / "six", colours=6)
    words = (f"task.data={data}", "task.classes=base", f"task.shift={data}", "task.shots=2", "zero.stage=0")
    for method, name in (("{name: coop, length: 4}", "open"), ("{name: linear_probe, c: 1.0}", "closed")):
        file = str(recipe_file(tmp_path, method=method, name=name))
        assert ranks.run(1, fine_tune, file, *words) == [(0, True)]
    found = scores.newest(tmp_path / "runs" / "open")
    zero = {f"few_shot/{part}zero_shot" for part in ("", "new/", "shift/")}
    assert set(found) == zero | {f"few_shot/{part}accuracy" for part in ("", "new/", "shift/")}
    assert found["few_shot/shift/accuracy"] == found["few_shot/accuracy"], "the shift is the test split itself"
    assert found["few_shot/new/accuracy"][1].count == 15
    closed = scores.newest(tmp_path / "runs" / "closed")
    assert set(found) - set(closed) == {"few_shot/new/accuracy"}, "a probe knows no class that it has not seen"


def test_words_that_start_as_a_template_name_new_classes_as_zero_shot_does(tmp_path, ranks):
    data = tiny.class_folders(tmp_path / "six", colours=6)
    file = str(recipe_file(tmp_path, method="{name: coop, words: a photo of a}"))
    words = (f"task.data={data}", "task.classes=base", "task.shots=2", "zero.stage=0", "optim.lr=0")
    assert ranks.run(1, fine_tune, file, *words) == [(0, True)]
    found = {name: score for name, (_, score) in scores.newest(tmp_path / "runs" / "run").items()}
    assert found["few_shot/new/accuracy"] == found["few_shot/new/zero_shot"]
    assert found["few_shot/accuracy"] == found["few_shot/zero_shot"]
    assert splits.halves(list("abcde")) == (range(3), range(3, 5))

"""One's own labelled pictures in every form give the same samples, and mistakes are sentences."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from finetune import sources, splits
from pretrain.config import ConfigError
from tests import tiny

CLASSES = {"blue shape", "green shape", "red shape"}


def bare(folder: Path, *, count: int = 10) -> Path:
    """Write FOLDER/CLASS/*.png, without splits."""
    made = tiny.class_folders(folder.with_name("split"), train=count, test=1)
    folder.mkdir()
    for path in (made / "train").iterdir():
        path.rename(folder / path.name)
    return folder


def test_a_folder_of_class_folders_is_cut_by_hash_class_by_class(tmp_path):
    folder = bare(tmp_path / "mine")
    (folder / "notes.txt").write_text("not a class")
    found = sources.find(str(folder))
    assert {split: Counter(s.name for s in found[split]) for split in sources.SPLITS} == {
        "train": dict.fromkeys(CLASSES, 5), "validation": dict.fromkeys(CLASSES, 2), "test": dict.fromkeys(CLASSES, 3),
    }  # fmt: skip
    assert sources.find(str(folder)) == found
    keys = [s.key for group in found.values() for s in group]
    assert len(set(keys)) == 30
    assert not {s.key.partition("/")[0] for s in found["test"]} - {"blue_shape", "green_shape", "red_shape"}
    (folder / "red_shape" / "another.png").write_bytes(found["test"][0].read()["png"])
    again = sources.find(str(folder))
    assert {s.key for s in again["test"] if "red" not in s.key} == {s.key for s in found["test"] if "red" not in s.key}


@pytest.mark.parametrize(("count", "wanted"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (7, (4, 1, 2))])
def test_small_classes_keep_something_to_train_and_to_test_on(count, wanted):
    samples = [sources.Sample(f"k{n}", 0, "a", lambda: {}) for n in range(count)]
    found = sources.cut(samples)
    assert tuple(len(found[split]) for split in sources.SPLITS) == wanted


def table(path: Path, rows: list[dict[str, str]]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_a_table_is_the_folder_that_it_lists(tmp_path):
    folder = bare(tmp_path / "mine")
    rows = [{"path": p.relative_to(tmp_path).as_posix(), "class": p.parent.name} for p in sorted(folder.glob("*/*"))]
    found = sources.find(table(tmp_path / "mine.csv", rows))
    assert {split: len(group) for split, group in found.items()} == {"train": 15, "validation": 6, "test": 9}
    assert splits.class_names(found["train"]) == sorted(CLASSES)
    named = [{**row, "split": ("train", "val", "test")[n % 3]} for n, row in enumerate(rows)]
    assert [len(group) for group in sources.find(table(tmp_path / "mine.csv", named)).values()] == [10, 10, 10]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "none.png", "class": "a"}, r"line 3 of .*there is no picture"),
        ({"path": "notes.txt", "class": "a"}, "no extension of a picture"),
        ({"path": "{first}", "class": " "}, "a row without a class"),
        ({"path": "{first}", "class": "a", "split": "dev"}, "split is 'dev', expected one of"),
        ({"path": "{first}"}, "needs the columns path and class, has"),
    ],
)
def test_mistakes_in_a_table(tmp_path, row, message):
    folder = bare(tmp_path / "mine")
    first = next(folder.glob("*/*")).relative_to(tmp_path).as_posix()
    row = {key: value.format(first=first) for key, value in row.items()}
    right = {**{key: "train" for key in row}, "path": first}
    if "class" in row:
        right["class"] = "b"
    with pytest.raises(ConfigError, match=message):
        sources.find(table(tmp_path / "mine.csv", [right, row]))


@pytest.mark.parametrize("row", ["a", "a, and b,{first}"])
def test_a_row_of_more_or_fewer_cells_is_refused(tmp_path, row):
    first = next(bare(tmp_path / "mine").glob("*/*"))
    (tmp_path / "mine.csv").write_text(f"class,path\na,{first}\n{row.format(first=first)}\n")
    with pytest.raises(ConfigError, match=r"line 3 of .* has not as many cells as the first line"):
        sources.find(str(tmp_path / "mine.csv"))


@pytest.mark.check("few-shot", 2)
def test_coops_published_splits_drop_in(tmp_path):
    folder = bare(tmp_path / "images")
    names = sorted(path.name for path in folder.iterdir())
    rows = [[p.relative_to(folder).as_posix(), names.index(p.parent.name), p.parent.name]
            for p in sorted(folder.glob("*/*"))]  # fmt: skip
    file = tmp_path / "split_zhou_Shapes.json"
    file.write_text(json.dumps({"train": rows[::3], "val": rows[1::3], "test": rows[2::3]}))
    found = sources.find(str(file), str(folder))
    assert [[s.key, s.target] for s in found["validation"]] == [row[:2] for row in rows[1::3]]
    assert {s.name for s in found["train"]} == CLASSES
    with pytest.raises(ConfigError, match=r"task\.images: there is no picture .*check what its path starts from"):
        sources.find(str(file))
    with pytest.raises(ConfigError, match=r"task\.images: is for split_zhou"):
        sources.find(str(folder), str(folder))
    file.write_text(json.dumps({"train": rows}))
    with pytest.raises(ConfigError, match="must hold"):
        sources.find(str(file), str(folder))


def test_shards_made_of_ones_own_pictures_draw_as_these_do(tmp_path):
    found = sources.find(str(bare(tmp_path / "mine")))
    for split, group in found.items():
        splits.write(sorted(group, key=lambda s: s.key), tmp_path / "shards", split)
    again = sources.find(str(tmp_path / "shards"))
    for split, group in found.items():
        drawn = [splits.draw(samples, 2, seed=3) for samples in (group, again[split])]
        assert [s[:3] for s in drawn[0]] == [s[:3] for s in drawn[1]]
        assert drawn[0][0].read() == drawn[1][0].read()


def test_pictures_are_found_at_any_depth_and_validation_may_be_called_val(tmp_path):
    folder = tiny.class_folders(tmp_path / "mine")
    want = {split: [s[:3] for s in group] for split, group in sources.find(str(folder)).items()}
    deep = folder / "train" / "red_shape" / "seen" / "yesterday"
    deep.mkdir(parents=True)
    (folder / "train" / "red_shape" / "5.png").rename(deep / "5.png")
    (folder / "train" / "red_shape" / ".trash").mkdir()
    (folder / "train" / "red_shape" / ".trash" / "0.png").write_bytes(b"")
    shutil.copytree(folder / "test", folder / "val")
    found = sources.find(str(folder))
    assert len(found["train"]) == 18 and "red_shape/seen/yesterday/5.png" in {s.key for s in found["train"]}
    assert [s[:3] for s in found["validation"]] == want["test"]
    for split, group in found.items():
        splits.write(group, tmp_path / "shards", "val" if split == "validation" else split)
    assert [s[:3] for s in sources.find(str(tmp_path / "shards"))["validation"]] == want["test"]
    (folder / "train" / "a_class").mkdir()
    with pytest.raises(ConfigError, match=r"a_class holds no picture \(jpg, "):
        sources.find(str(folder))

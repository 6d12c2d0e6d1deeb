"""Pictures with captions in every form, cut by hash where nobody has split them."""

import csv
import json
from pathlib import Path

import pytest

from finetune import pairs
from pretrain.config import ConfigError
from pretrain.data import synthetic
from tests import tiny


def folder(path: Path, count: int = 20) -> Path:
    """Write pictures with two captions each."""
    for number in range(count):
        file = path / f"{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(synthetic.sample(number, size=32, seed=0)["png"])
        file.with_suffix(".txt").write_text(f"picture {number}\n\n a shape of number {number} \n")
    return path


def sizes(found: pairs.Found) -> dict[str, int]:
    return {split: len(group) for split, group in found.items()}


def test_a_folder_a_table_and_karpathys_file_hold_the_same_pairs(tmp_path):
    mine = folder(tmp_path / "mine")
    found = pairs.find(str(mine))
    assert sizes(found) == {"test": 2, "validation": 2, "train": 16}
    one = found["test"][0]
    assert one.captions == [f"picture {Path(one.key).stem}", f"a shape of number {Path(one.key).stem}"]
    everyone = [pair for group in found.values() for pair in group]
    with open(mine / "mine.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *((p.key, line) for p in everyone for line in p.captions)])
    again = pairs.find(str(mine / "mine.csv"))
    assert {s: [p[:2] for p in g] for s, g in again.items()} == {s: [p[:2] for p in g] for s, g in found.items()}
    words = {"train": ["train", "restval"], "validation": ["val"], "test": ["test"]}
    rows = []
    for split, group in found.items():
        for n, p in enumerate(group):
            raw = [{"raw": line, "tokens": []} for line in p.captions]
            path, names = Path(p.key), words[split]
            rows.append({"filepath": str(path.parent), "filename": path.name, "sentences": raw,
                         "split": names[n % len(names)]})  # fmt: skip
    (tmp_path / "dataset_mine.json").write_text(json.dumps({"images": rows, "dataset": "mine"}))
    third = pairs.find(str(tmp_path / "dataset_mine.json"), str(mine))
    assert {s: [p[:2] for p in g] for s, g in third.items()} == {s: [p[:2] for p in g] for s, g in found.items()}
    with pytest.raises(ConfigError, match="there is no picture"):
        pairs.find(str(tmp_path / "dataset_mine.json"))


def test_folders_that_are_split_already_and_shards(tmp_path):
    mine = tmp_path / "mine"
    for split, count in (("train", 5), ("test", 3)):
        folder(mine / split, count)
    assert sizes(pairs.find(str(mine))) == {"train": 5, "validation": 0, "test": 3}
    folder(mine / "val", 2)
    assert sizes(pairs.find(str(mine))) == {"train": 5, "validation": 2, "test": 3}
    tiny.corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "shapes-00000.tar").rename(tmp_path / "corpus" / "train-00000.tar")
    with pytest.raises(ConfigError, match="has no test split"):
        pairs.find(str(tmp_path / "corpus"))
    (tmp_path / "corpus" / "shapes-00001.tar").rename(tmp_path / "corpus" / "test-00000.tar")
    assert pairs.find(str(tmp_path / "corpus")) is None


def test_mistakes_are_sentences(tmp_path):
    mine = folder(tmp_path / "mine", 2)
    (mine / "0" / "0.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"picture 0/0\.png has no caption"):
        pairs.find(str(mine))
    (mine / "0" / "0.txt").unlink()
    with pytest.raises(ConfigError, match=r"0\.png has no captions in 0\.txt"):
        pairs.find(str(mine))
    with pytest.raises(ConfigError, match=r"is for Karpathy's"):
        pairs.find(str(mine), str(mine))
    (tmp_path / "a.csv").write_text("path,text\na.png,b\n")
    with pytest.raises(ConfigError, match="needs the columns path and caption"):
        pairs.find(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("path,caption\nmine/1/1.png,a cat, asleep\n")
    with pytest.raises(ConfigError, match="put a cell that holds a comma in double quotes"):
        pairs.find(str(tmp_path / "a.csv"))

"""COCO: all captions of an image in one sample, boxes as [x, y, w, h], instances joined to captions."""

import json
from pathlib import Path

import pytest

from data_tools.__main__ import main
from tests.data_tools.pictures import read, small


def coco(folder: Path) -> tuple[Path, Path]:
    """Write the usual layout: train2017/ and annotations/ with captions and instances of three images."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    images = [{"id": 9 - at, "file_name": f"{at}.png", "width": 8, "height": 6} for at in range(3)]
    for at in range(3):
        (folder / "train2017" / f"{at}.png").write_bytes(small(at))
    said = [(9, "one "), (8, "two"), (9, "uno"), (7, "three")]
    captions = {"images": images, "annotations": [{"image_id": at, "id": n, "caption": text} for n, (at, text) in
                                                  enumerate(said)]}  # fmt: skip
    boxes = [
        {"image_id": 9, "category_id": 90, "bbox": [1, 2, 3.5, 4], "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 8, 6], "iscrowd": 1, "segmentation": {"counts": "x"}},
        {"image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2]},
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    paths = folder / "annotations" / "captions_train2017.json", folder / "annotations" / "instances_train2017.json"
    paths[0].write_text(json.dumps(captions))
    paths[1].write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return paths


def test_captions_with_boxes(tmp_path: Path) -> None:
    captions, instances = coco(tmp_path / "coco")
    assert main(["build", str(captions), "--boxes", str(instances), "--out", str(tmp_path / "out")]) == 0
    first, second, _ = read(tmp_path / "out").values()
    assert (first["png"], first["txt"]) == (small(0), b"one")
    assert json.loads(first["json"]) == {
        "image_id": 9, "width": 8, "height": 6, "captions": ["one", "uno"],
        "boxes": [[1, 2, 3.5, 4], [0, 0, 8, 6]], "categories": ["toothbrush", "person"], "crowd": [0, 1],
    }  # fmt: skip
    assert json.loads(second["json"])["boxes"] == []


def test_instances_alone_need_no_caption(tmp_path: Path) -> None:
    _, instances = coco(tmp_path / "coco")
    assert main(["build", str(instances), "--out", str(tmp_path / "out")]) == 0
    found = list(read(tmp_path / "out").values())
    assert [set(members) for members in found] == [{"png", "json"}] * 3
    assert json.loads(found[2]["json"])["categories"] == ["person"]


def test_captions_alone(tmp_path: Path) -> None:
    captions, _ = coco(tmp_path / "coco")
    words = ["build", str(captions), "--images", str(tmp_path / "coco" / "train2017"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert json.loads(read(tmp_path / "out")["00000001"]["json"]) == {"image_id": 8, "width": 8, "height": 6}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "not JSON"), ("[1]", "not COCO's form"), ('{"images": [], "annotations": [{"id": 1}]}', "has no image_id")],
)
def test_sentences(tmp_path: Path, capsys: pytest.CaptureFixture, text: str, sentence: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert main(["build", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err

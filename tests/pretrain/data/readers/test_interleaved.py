"""Documents: every picture at its place holder, whichever way the source says where it stands."""

import base64
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decode import BadSample
from pretrain.data.format import ShardWriter
from pretrain.data.loader import Config, Loader
from pretrain.data.readers import base
from pretrain.data.transforms import Transform
from tests.soak.fuzz import composer
from tests.tiny import record


def grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


MEMBERS = {f"{number}.png": grey(10 * number) for number in range(5)}


def read(tree: dict, options: dict | None = None, draw: int = 0, **members: bytes):
    return base.make({"interleaved": options or {}}).read(record(draw, json=tree, **(members or MEMBERS)))


def levels(example) -> list[int]:
    return [int(np.asarray(image)[0, 0, 0]) for image in example.images]


def info(*places: int) -> list[dict]:
    return [{"image_name": f"{number}.PNG", "matched_text_index": place} for number, place in enumerate(places)]


def test_positions():
    example = read({"text_list": ["a", "b", "c"], "image_info": info(2, 0, 2, 3), "url": "u"})
    assert example.suffix == "<image> a b <image> <image> c <image>" and levels(example) == [10, 0, 20, 30]
    assert example.meta == {"text_list": ["a", "b", "c"], "url": "u"} and example.prefix == ""


def test_nulls():
    tree = {"texts": ["a", None, None, "b"], "images": [None, "1.png", "3.png", None]}
    example = read(tree, {"placeholder": "[P]", "separator": "\n"})
    assert example.suffix == "a\n[P]\n[P]\nb" and levels(example) == [10, 30]


def test_pictures_in_the_json():
    entry = {"image_base64": base64.b64encode(grey(70)).decode(), "matched_text_index": 0}
    example = read({"text_list": ["a"], "image_info": [entry]})
    assert example.suffix == "<image> a" and levels(example) == [70]
    assert "image_info" not in example.meta, "bytes are not carried along"


def test_run_of_a_long_document():
    tree = {"text_list": list("abcdef"), "image_info": info(1, 2, 3, 4, 5)}
    found = {(e.suffix, *levels(e)) for e in (read(tree, {"max_images": 2}, draw) for draw in range(60))}
    assert found == {
        ("a <image> b <image> c", 0, 10),
        ("<image> c <image> d", 10, 20),
        ("<image> d <image> e", 20, 30),
        ("<image> e <image> f", 30, 40),
    }


def test_a_broken_picture_outside_the_run_is_not_decoded():
    tree = {"text_list": ["a", "b"], "image_info": info(0, 1)}
    members = {"0.png": grey(0), "1.png": b"junk"}
    outcomes = set()
    for draw in range(20):
        try:
            example = read(tree, {"max_images": 1}, draw, **members)
            levels(example)  # decoded at the latest here
            outcomes.add(example.suffix)
        except BadSample as reason:
            outcomes.add(str(reason)[:23])
    assert outcomes == {"<image> a", "image cannot be decoded"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"text_list": ["a"], "image_info": []}, "without pictures"),
        ({"text_list": ["a"], "image_info": info(2)}, "matched_text_index is 2 of 1 texts"),
        ({"text_list": ["a"], "image_info": ["0.png"]}, "is None of 1 texts"),
        ({"text_list": ["a"], "image_info": [{"image_name": "9.png", "matched_text_index": 0}]}, "no member '9.png'"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "names no member"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_base64": "?"}]}, "no base64"),
        ({"text_list": ["a <image>"], "image_info": info(0)}, "set another placeholder"),
        ({"texts": ["a", None], "images": [None]}, "exactly where the text is null"),
        ({"texts": ["a", None], "images": ["0.png", "1.png"]}, "exactly where the text is null"),
        ({"text_list": "a", "image_info": info(0)}, "no lists"),
        ({"text_list": [""], "image_info": info(0)}, "empty"),
    ],
)
def test_bad_documents(tree, words):
    with pytest.raises(BadSample, match=words):
        read(tree)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_own_as_many_pictures_as_they_have_place_holders(tmp_path, workers):
    path = tmp_path / "documents.tar"
    with ShardWriter(path) as writer:
        for count in range(6):  # the first document has no picture: it is listed, not lost
            tree = {"text_list": ["a", "b"], "image_info": info(*[n % 3 for n in range(min(count, 5))])}
            writer.add(f"{count}", {**MEMBERS, "json": json.dumps(tree).encode()})
    config = Config(shards=str(path), workers=workers, lanes=2, reader={"interleaved": {"max_images": 3}})
    more = {"transform": Transform(8), "composer": composer(), "rank": 0, "world": 1}
    bad = []
    for batch in itertools.islice(Loader(config, batch_size=4, seed=0, **more).iterate(), 6):
        owners = batch.owner_N.tolist()
        assert owners == sorted(owners) and batch.image_NCHW.shape == (len(owners), 3, 8, 8)
        assert [owners.count(row) for row in range(4)] == [min(int(key), 3) for key in batch.keys]
        bad += batch.bad
    assert {line["key"] for line in bad} == {"0"} and len(bad) == 4

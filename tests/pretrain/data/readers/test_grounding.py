"""Boxes stay where they were drawn: through EXIF, resized copies, training and evaluation, seen in the pixels."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pretrain.config import ConfigError
from pretrain.data import synthetic, tokenizer
from pretrain.data.compose import Composer
from pretrain.data.decode import BadSample
from pretrain.data.format import ShardWriter
from pretrain.data.loader import Config, Loader, scan
from pretrain.data.readers import base
from pretrain.data.transforms import Augment, Transform
from tests.tiny import record

WIDTH, HEIGHT, BOX = 90, 40, [60, 10, 24, 18]  # x y w h in the upright picture, off the centre on purpose
EDGES = [60 / 90, 10 / 40, 84 / 90, 28 / 40]


def picture(*, turned: bool = False, scale: float = 1.0) -> bytes:
    """Return a grey picture with a red box; `turned`: stored on its side, with the EXIF tag that puts it upright."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
    ImageDraw.Draw(image).rectangle((60, 10, 83, 27), fill=(255, 0, 0))
    image = image.resize((round(WIDTH * scale), round(HEIGHT * scale)), Image.Resampling.BOX)
    exif = Image.Exif()
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6  # turn by 270 degrees to see it upright
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


PICTURES = {"plain": picture(), "turned": picture(turned=True), "smaller": picture(scale=0.5)}
META = {"expression": "the red one", "box": BOX, "width": WIDTH, "height": HEIGHT}


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("boxes") / "boxes.tar"
    with ShardWriter(path) as writer:
        for name, data in PICTURES.items():
            writer.add(name, {"jpg": data, "json": json.dumps(META).encode()})
    return str(path)


def red(image_CHW: np.ndarray) -> tuple[float, ...]:
    """Return the edges of what is redder than its surroundings, in [0, 1]."""
    excess_HW = image_CHW[0] - image_CHW[1:].mean(0)
    ys, xs = np.nonzero(excess_HW > (excess_HW.max() + excess_HW.min()) / 2)
    side = image_CHW.shape[1]
    return xs.min() / side, ys.min() / side, (xs.max() + 1) / side, (ys.max() + 1) / side


@pytest.mark.parametrize("augment", [None, {"brightness": 0.3, "saturation": 0.3, "contrast": 0.2}, {}])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_boxes_in_the_pixels(shard, augment, resize_mode):
    """Both transforms, even where the model would crop: the batch's box is where the red is."""
    words = tokenizer.train([f"a {label}" for label in synthetic.CLASSES], 560)
    transform = Transform(64, resize_mode=resize_mode)
    composer = Composer(words, context_length=16)
    more = {"transform": transform, "composer": composer}
    if augment is None:
        [batch] = scan(shard, reader={"grounding": {}}, batch_size=3, **more)
    else:
        config = Config(shards=shard, workers=0, lanes=1, reader={"grounding": {}}, augment=augment)
        [batch] = itertools.islice(Loader(config, batch_size=3, seed=0, rank=0, world=1, **more).iterate(), 1)
    assert sorted(batch.keys) == ["plain", "smaller", "turned"] and batch.box_owner_K.tolist() == [0, 1, 2]
    for image_CHW, box_4 in zip(batch.image_NCHW, batch.boxes_K4):
        assert box_4.tolist() == pytest.approx(EDGES)
        assert red(image_CHW.float().numpy()) == pytest.approx(EDGES, abs=2 / 64)


@pytest.mark.parametrize(
    ("augment", "names"),
    [
        ({"flip": 0.5}, "flip"),
        ({"scale": (0.5, 1.0), "rotate": 5}, "scale, rotate"),
        ({"zoom": (0.8, 1.2), "translate": 0.1, "ratio": (0.5, 2)}, "ratio, zoom, translate"),
    ],
)
def test_what_moves_pixels_is_refused(shard, augment, names):
    words = tokenizer.train(["a"], 520)
    more = {"transform": Transform(8), "composer": Composer(words, context_length=16), "rank": 0, "world": 1}
    config = Config(shards=shard, workers=0, lanes=1, reader={"grounding": {}}, augment=augment)
    with pytest.raises(ConfigError, match=rf"^data\.augment: {names} would move the pictures away from the boxes"):
        Loader(config, batch_size=1, seed=0, **more)
    Loader(
        config.model_copy(update={"reader": {"caption": {"text": ["json:expression"]}}}), batch_size=1, seed=0, **more
    )


def test_what_the_user_did_not_set_is_not_refused():
    assert Augment().moving() == []
    assert Augment(**Augment().model_dump()).moving() == []  # as a run's own config.yaml holds it
    assert Augment(scale=(1.0, 1.0), brightness=1, hue=0.1, grey=0.5).moving() == []


def read(options: dict | None = None, draw: int = 0, **meta: object):
    tree = {"expression": "it", "width": 8, "height": 8, **meta}
    return base.make({"grounding": options or {}}).read(record(draw, json=tree))


def test_both_directions():
    located = read(box=[2, 4, 4, 2])
    assert (located.prefix, located.suffix, located.boxes_K4.tolist()) == ("it", "", [[0.25, 0.5, 0.75, 0.75]])
    described = read({"direction": "describe", "prompt": "what is here?"}, box=[2, 4, 4, 2])
    assert (described.prefix, described.suffix) == ("what is here?", "it")
    assert read({"prompt": "where is {}?"}, box=[2, 4, 4, 2]).prefix == "where is it?"
    for options in ({"prompt": "where?"}, {"direction": "describe", "prompt": "where is {}?"}):
        with pytest.raises(ConfigError, match="one hole"):
            base.make({"grounding": options})


def test_regions_of_one_picture():
    regions = [{"expression": name, "box": [at, 0, 2, 2]} for at, name in enumerate(["a", "b", "c"])]
    found = [read({"items": "json:regions"}, draw, regions=regions) for draw in range(40)]
    assert {(example.prefix, float(example.boxes_K4[0, 0])) for example in found} == {
        ("a", 0),
        ("b", 0.125),
        ("c", 0.25),
    }


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, "no box: none of"),
        ({"box": [1, 2, 3]}, "no four numbers"),
        ({"box": [1, 2, "3", 4]}, "no four numbers"),
        ({"box": [[1, 2, 3, 4], []]}, "no four numbers"),
        ({"box": [9, 9, 2, 2]}, "no area inside the picture of 8 x 8"),
        ({"box": [1, 1, 0, 2]}, "no area"),
        ({"box": [0.1, 0.1, 0.5, 0.5]}, "looks like fractions, set unit"),
        ({"box": [1, 1, 2, 2], "width": 80}, "for a picture of 80 x 8, this one is 8 x 8"),
        ({"box": [1, 1, 2, 2], "width": 0}, "two positive numbers"),
        ({"box": [1, 1, 2, 2], "height": None}, "two positive numbers"),
    ],
)
def test_bad_boxes(meta, words):
    with pytest.raises(BadSample, match=words):
        read(**meta)

"""Every reader, found by its file name, on fixture shards: a new reader gains all of these tests with its file."""

import copy
import importlib
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

from pretrain import registry
from pretrain.batch import Batch, Example, Record
from pretrain.config import ConfigError, Section
from pretrain.data import index, synthetic, tokenizer
from pretrain.data.compose import Composer
from pretrain.data.decode import BadSample
from pretrain.data.loader import Config, Loader, scan
from pretrain.data.order import Place
from pretrain.data.readers import base
from pretrain.data.shards import Store
from pretrain.data.transforms import Transform

NAMES = registry.names(base.PACKAGE)
SAMPLES = 6
WORDS = tokenizer.train([f"a {label}" for label in synthetic.CLASSES], 560)
COMPOSER = Composer(WORDS, context_length=32)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    return str(synthetic.write(tmp_path_factory.mktemp("shapes"), shards=1, samples=SAMPLES, size=12)[0])


@pytest.fixture(scope="module")
def records(shard) -> list[Record]:
    store = Store(index.resolve(shard), seed=0)
    return [store.read(Place(0, member, 0, member)) for member in range(SAMPLES)]


def make(name: str) -> base.Reader:
    options = getattr(importlib.import_module(f"{base.PACKAGE}.{name}"), "FIXTURE", {})
    return base.make({name: options})  # a reader that the fixture does not suit says there how to read it


def seen(example: Example) -> tuple:
    boxes = None if example.boxes_K4 is None else example.boxes_K4.tolist()
    return example.prefix, example.suffix, example.group, example.target, boxes, example.meta, len(example.images)


@pytest.mark.parametrize("name", NAMES)
def test_its_file(name):
    module = importlib.import_module(f"{base.PACKAGE}.{name}")
    assert issubclass(module.Config, Section) and issubclass(module.Reader, base.Reader)
    assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__), "name the paper"
    assert "Source:" in module.__doc__ and "suffix" in module.__doc__, "say where its texts come from and go"
    with pytest.raises(ConfigError, match=rf"data\.reader\.{name}: unknown key 'no_such_key'"):
        base.make({name: {"no_such_key": 1}})


@pytest.mark.parametrize("name", NAMES)
def test_example(name, records):
    reader = make(name)
    for record in records:
        example = reader.read(record)
        assert (example.key, example.shard, example.draw) == (record.key, record.shard, record.draw)
        assert example.prefix or example.suffix or example.images
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in example.images)
        json.dumps(example.meta, allow_nan=False)
        boxes_K4 = example.boxes_K4
        assert (boxes_K4 is not None) == reader.boxes
        if boxes_K4 is not None:
            assert boxes_K4.dtype == np.float32 and boxes_K4.shape[1:] == (4,) and len(boxes_K4)
            assert ((boxes_K4 >= 0) & (boxes_K4 <= 1)).all() and (boxes_K4[:, :2] < boxes_K4[:, 2:]).all()


@pytest.mark.parametrize("name", NAMES)
def test_draws_from_the_record_alone(name, records):
    reader = make(name)
    for record in records:
        moved = Record(record.key, "elsewhere.tar", dict(record.fields), epoch=7, draw=record.draw)
        before = copy.deepcopy(record.fields)
        assert seen(reader.read(record)) == seen(reader.read(moved)) == seen(make(name).read(record))
        assert record.fields == before


@pytest.mark.parametrize("name", NAMES)
def test_members_missing_or_broken(name, records):
    reader = make(name)
    for record in records[:2]:
        for extension in record.fields:
            for damage in (None, b"", b"\xff\x00junk", record.fields[extension][:-7]):
                fields = {**record.fields, extension: damage}
                outcome(reader, {key: data for key, data in fields.items() if data is not None}, record)
        with pytest.raises(BadSample):
            reader.read(Record(record.key, record.shard, {}, draw=record.draw))


ODD = [None, True, -1, 3, 2**80, 1.5, "", " ", "a", "\ud800", "x" * 5000, [], ["a"], [None], [[]], [3], {}, {"a": {}}]


@pytest.mark.parametrize("name", NAMES)
def test_odd_values_in_json(name, records):
    """Whatever a json member holds, the outcome is a row of a batch or a reason, never another exception."""
    reader = make(name)
    meta = json.loads(records[0].fields["json"])
    trees = [{**meta, key: value} for key, value in itertools.product(meta, ODD)]
    trees += [{key: value for key, value in meta.items() if key != left_out} for left_out in meta]
    trees += [[*ODD], "text", 5, {}]
    outcomes = []
    for number, tree in enumerate(trees):
        fields = {**records[0].fields, "json": json.dumps(tree).encode()}
        outcomes += [outcome(reader, fields, records[0], draw=draw) for draw in (number, number + 1)]
    assert any(outcomes)


def outcome(reader: base.Reader, fields: dict[str, bytes], like: Record, *, draw: int | None = None) -> bool:
    """Return whether a record becomes a batch; anything but a reason why not is an error."""
    record = Record(like.key, like.shard, fields, draw=like.draw if draw is None else draw)
    try:
        example = reader.read(record)
        assert all(np.asarray(image).ndim == 3 for image in example.images)  # decoded at the latest here
    except BadSample as reason:
        assert str(reason) and len(str(reason)) < 1000
        return False
    images = [np.zeros((4, 4, 3), dtype=np.uint8) for _ in example.images]
    batch = COMPOSER.collate([COMPOSER.row(example, images)])
    assert all(math.isfinite(x) for x in batch.boxes_K4.flatten()) if batch.boxes_K4 is not None else True
    return True


@pytest.mark.parametrize("name", NAMES)
def test_through_the_loader(name, shard, records):
    options = {name: getattr(importlib.import_module(f"{base.PACKAGE}.{name}"), "FIXTURE", {})}
    transform, count = Transform(8), len(make(name).read(records[0]).images)
    config = Config(shards=shard, workers=0, lanes=2, reader=options)
    loader = Loader(config, batch_size=4, seed=0, transform=transform, composer=COMPOSER, rank=0, world=1)
    first, second = itertools.islice(loader.iterate(), 2)
    [whole] = scan(shard, reader=options, transform=transform, composer=COMPOSER, batch_size=SAMPLES)
    assert first.keys != second.keys
    for batch, rows in ((first, 4), (second, 4), (whole, SAMPLES)):
        check(batch, rows=rows, images=count, boxes=make(name).boxes)


def check(batch: Batch, *, rows: int, images: int, boxes: bool) -> None:
    assert not batch.bad and len(batch) == rows
    if images:
        assert batch.image_NCHW.shape == (rows * images, 3, 8, 8)
        assert batch.owner_N.tolist() == [row for row in range(rows) for _ in range(images)]
    else:
        assert batch.image_NCHW is None and batch.owner_N is None
    if boxes:
        assert batch.boxes_K4.shape == (len(batch.box_owner_K), 4) and batch.boxes_K4.dtype == torch.float32
        assert sorted(set(batch.box_owner_K.tolist())) == list(range(rows))
    else:
        assert batch.boxes_K4 is None and batch.box_owner_K is None
    assert torch.equal(batch.to("cpu").tokens_BT, batch.tokens_BT)

"""Every reader, found by its file name, on a fixture shard."""

import importlib

import numpy as np
import pytest

from pretrain import registry
from pretrain.batch import Example
from pretrain.config import Section
from pretrain.data import index, synthetic
from pretrain.data.decode import BadSample
from pretrain.data.order import Place
from pretrain.data.readers import base
from pretrain.data.shards import Store

NAMES = registry.names(base.PACKAGE)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    paths = synthetic.write(tmp_path_factory.mktemp("shapes"), shards=1, samples=6, size=12)
    return Store(index.resolve([str(path) for path in paths]), seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_reader(name, store):
    module = importlib.import_module(f"{base.PACKAGE}.{name}")
    assert module.__doc__ and issubclass(module.Config, Section) and issubclass(module.Reader, base.Reader)
    options = getattr(module, "FIXTURE", {})  # a reader of other members says here how to read the fixture's
    reader = base.make({name: options})
    for member in range(6):
        record = store.read(Place(0, member, 0, member))
        one, two = reader.read(record), reader.read(record)
        assert isinstance(one, Example) and (one.key, one.shard, one.draw) == (record.key, record.shard, record.draw)
        assert (one.prefix, one.suffix, one.group, one.target) == (two.prefix, two.suffix, two.group, two.target)
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in one.images)
        record.fields.clear()
        with pytest.raises(BadSample):
            reader.read(record)

"""Objects: boxes and names in the same order, attributes before names."""

import pytest

from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from tests.tiny import record

OBJECTS = [{"box": [0, 0, 4, 8], "label": "car", "attribute": "red"}, {"bbox": [2, 2, 4, 4], "name": "sky"}]


def test_objects():
    found = base.make({"detection": {}}).read(record(json={"objects": OBJECTS}))
    assert found.meta["names"] == ["red car", "sky"] and found.suffix == "red car, sky" and not found.prefix
    assert found.boxes_K4.tolist() == [[0, 0, 0.5, 1], [0.25, 0.25, 0.75, 0.75]]
    assert base.make({"detection": {"most": 1}}).read(record(json={"objects": OBJECTS})).meta["names"] == ["red car"]


@pytest.mark.parametrize("objects, message", [
    (None, "no list of objects"),
    ([], "no list of objects"),
    ([{"label": "car"}], "an object has no box"),
    ([{"box": [0, 0, 4, 4]}], "an object has no name"),
    ([{"box": [0, 0, 4], "label": "car"}], "no four numbers"),
])  # fmt: skip
def test_broken_objects_are_a_reason(objects, message):
    with pytest.raises(BadSample, match=message):
        base.make({"detection": {}}).read(record(json={"objects": objects}))

"""A detector's regions: read beside the picture, in [0, 1], equally many boxes and features."""

import io

import numpy as np
import pytest

from pretrain.batch import Record
from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from pretrain.data.regions import Config, attach
from tests.tiny import record

BOXES = np.array([[0, 0, 4, 8], [2, 2, 8, 8]], dtype=np.float32)  # of a picture of 8 x 8 pixels


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read(given: Record, **options):
    return attach(base.make({"caption": {}}).read(given), given, Config(**options))


def sample(**members) -> Record:
    made = record(txt=b"a cat", json={"found": BOXES.tolist()})
    made.fields |= {"boxes.npy": npy(BOXES), "features.npy": npy(np.arange(6).reshape(2, 3) / 2)}
    made.fields |= {name.replace("_", "."): value for name, value in members.items()}
    return made


def test_boxes_and_features():
    found = read(sample())
    assert found.regions_K4.tolist() == [[0, 0, 0.5, 1], [0.25, 0.25, 1, 1]] and found.boxes_K4 is None
    assert found.region_KC.dtype == np.float32 and found.region_KC.tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]
    assert read(sample(), most=1).region_KC.tolist() == [[0, 0.5, 1]]
    assert read(sample(), boxes="json:found", features=None).regions_K4.tolist() == found.regions_K4.tolist()
    fractions = sample(boxes_npy=npy(BOXES / 8))
    assert read(fractions, unit="fractions").regions_K4.tolist() == found.regions_K4.tolist()


@pytest.mark.parametrize("members, message", [
    ({"boxes_npy": b"junk"}, "boxes.npy is no .npy"),
    ({"boxes_npy": npy(BOXES[:, :3])}, r"expected floats \[regions, 4\]"),
    ({"features_npy": npy(np.ones((3, 2)))}, "2 boxes in boxes.npy, but 3 features"),
    ({"features_npy": npy(np.full((2, 2), np.nan))}, "not finite"),
    ({"features_npy": npy(np.ones((2, 2), dtype=int))}, "features.npy holds int64"),
])  # fmt: skip
def test_what_is_broken_is_a_reason(members, message):
    with pytest.raises(BadSample, match=message):
        read(sample(**members))
    with pytest.raises(BadSample, match=r"no regions: boxes\.npy is not there"):
        read(record(txt=b"a cat"))

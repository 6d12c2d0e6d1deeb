"""Every layout and unit gives the same corners."""

import numpy as np
import pytest

from pretrain.data.boxes import normalised, reference
from pretrain.data.decode import BadSample

SIZE = (200, 100)
EXPECTED = [0.1, 0.2, 0.4, 0.6]


@pytest.mark.parametrize(
    ("layout", "pixels"), [("xyxy", [20, 20, 80, 60]), ("xywh", [20, 20, 60, 40]), ("cxcywh", [50, 40, 60, 40])]
)
def test_layouts_and_units(layout, pixels):
    fractions = [value / side for value, side in zip(pixels, SIZE * 2)]
    for found, unit in ((pixels, "pixels"), (fractions, "fractions"), ([pixels, pixels], "pixels")):
        boxes_K4 = normalised(found, "box", SIZE, layout=layout, unit=unit)
        assert boxes_K4.dtype == np.float32 and boxes_K4.shape[1] == 4
        assert all(row == pytest.approx(EXPECTED) for row in boxes_K4.tolist())


def test_cut_at_the_border_and_told_apart():
    assert normalised([-20, 50, 60, 400], "box", SIZE, layout="xyxy", unit="pixels").tolist() == [
        pytest.approx([0, 0.5, 0.3, 1])
    ]
    with pytest.raises(BadSample, match="looks like pixels"):
        normalised([20, 20, 80, 60], "box", SIZE, layout="xyxy", unit="fractions")
    for bad in (float("nan"), float("inf"), True, 10**400, None):
        with pytest.raises(BadSample, match="no four numbers"):
            normalised([1, 1, 2, bad], "box", SIZE, layout="xyxy", unit="pixels")


def test_reference():
    assert reference((None, None), SIZE) == SIZE
    assert reference((2000, 1000), SIZE) == (2000.0, 1000.0)
    assert reference((1999, 1003), (20, 10)) == (1999.0, 1003.0)  # a thumbnail's sides are rounded
    with pytest.raises(BadSample, match="when upright"):
        reference((100, 200), SIZE)

"""torch's resize of uint8 regions is Pillow's."""

import numpy as np
import pytest
from PIL import Image

from pretrain.data.resize import resize
from tests.benchmarks.photographs import photograph

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("box", [(0, 0, 150, 100), (7, 3, 60, 90), (10, 20, 32, 48), (149, 99, 1, 1), (0, 50, 150, 1)])
@pytest.mark.parametrize("mirror", [False, True])
def test_equals_pillow(interpolation, box, mirror):
    image = photograph(150, 100, seed=0)
    left, top, width, height = box
    expected = image.crop((left, top, left + width, top + height)).resize((32, 48), FILTERS[interpolation])
    expected_HWC = np.asarray(expected)[:, ::-1] if mirror else np.asarray(expected)
    out_HWC = resize(np.asarray(image), box, (32, 48), interpolation, mirror=mirror)
    assert out_HWC.dtype == np.uint8 and out_HWC.flags.c_contiguous
    assert np.abs(out_HWC.astype(int) - expected_HWC).max() <= 3


def test_borders_between_pixels_are_rounded_and_stay_inside():
    image_HWC = np.asarray(photograph(50, 40, seed=1))
    for box, whole in (((0.4, 0.6, 20.2, 10.0), (0, 1, 21, 10)), ((49.8, 39.9, 0.2, 0.1), (49, 39, 1, 1))):
        out = resize(image_HWC, box, (16, 16), "bicubic")
        assert np.array_equal(out, resize(image_HWC, whole, (16, 16), "bicubic"))

"""Fast decoding gives Pillow's pixels and Pillow's verdicts; reductions are the picture made smaller."""

import io

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decode import DecodeError, decode_image
from pretrain.data.picture import Picture, reduction_for
from tests.benchmarks.photographs import jpeg, photograph


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def small(reduction: int, data: bytes) -> tuple[np.ndarray, list[int]]:
    """The exact pixels, each block averaged, and the width and height that are expected."""
    exact_HWC = decode_image(data)
    size = [-(-side // reduction) for side in exact_HWC.shape[1::-1]]
    return np.asarray(Image.fromarray(exact_HWC).reduce(reduction)), size


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(96, 64), (61, 83), (8, 9), (2, 3)])
def test_full_size_is_pillows(size, subsampling, progressive):
    data = jpeg(*size, seed=1, quality=90, subsampling=subsampling, progressive=progressive)
    picture = Picture(data)
    assert picture.size == size and picture.shape == (size[1], size[0], 3)
    image_HWC, reduction = picture.fast()
    assert reduction == 1 and np.array_equal(image_HWC, decode_image(data))
    assert np.array_equal(np.asarray(picture), image_HWC) and picture.dtype == np.asarray(picture).dtype


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("size", [(200, 160), (203, 161)])
def test_reductions(size, reduction):
    data = jpeg(*size, seed=2, quality=90)
    image_HWC, got = Picture(data).fast(reduction)
    averaged_HWC, expected = small(reduction, data)
    assert got == reduction and image_HWC.shape == (expected[1], expected[0], 3)
    inner = np.abs(image_HWC.astype(int) - averaged_HWC)[:-1, :-1]  # the last blocks of odd sizes are filled up
    assert inner.mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(48, 32, seed=3), "JPEG", exif=exif)
    picture = Picture(data)
    assert picture.size == ((32, 48) if orientation > 4 else (48, 32))
    image_HWC, _ = picture.fast()
    assert np.array_equal(image_HWC, decode_image(data)) and image_HWC.flags.c_contiguous
    reduced_HWC, _ = picture.fast(2)
    assert np.abs(reduced_HWC.astype(int) - small(2, data)[0]).mean() < 2


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"), ("RGB", "GIF")],
)
def test_other_modes_and_formats_are_pillows(mode, kind):
    image = photograph(40, 30, seed=4)
    image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    picture = Picture(encode(image, kind))
    image_HWC, reduction = picture.fast(2)
    assert picture.size == (40, 30)
    if reduction == 1:
        assert np.array_equal(image_HWC, picture.exact())
    assert (reduction, image_HWC.shape) == ((2, (15, 20, 3)) if mode == "L" else (1, (30, 40, 3)))


def test_cut_off_anywhere_is_an_error():
    data = jpeg(40, 30, seed=5, quality=80)
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            Picture(data[:length]).fast()


def test_what_simplejpeg_refuses_pillow_judges():
    data = bytearray(jpeg(40, 30, seed=6, quality=80))
    odd = bytes(data[:2] + b"\xff\xfe\x00\x04hi" + b"junk" + data[2:])  # bytes between two markers: a warning
    picture = Picture(odd)
    try:
        expected = decode_image(odd)
    except DecodeError:
        with pytest.raises(DecodeError):
            picture.fast()
    else:
        assert np.array_equal(picture.fast()[0], expected)


def test_the_header_alone_refuses_a_large_picture():
    picture = Picture(jpeg(40, 30, seed=7, quality=80), max_pixels=1199)
    for ask in (lambda: picture.size, picture.fast, picture.exact):
        with pytest.raises(DecodeError, match=r"40 x 30 pixels is over data\.max_pixels=1199"):
            ask()


def test_pixels_are_a_picture_too():
    image_HWC = np.zeros((3, 5, 3), dtype=np.uint8)
    picture = Picture(image_HWC)
    assert picture.size == (5, 3) and picture.fast(4)[0] is image_HWC


def test_reduction_leaves_enough():
    assert [reduction_for((w, 500), (224, 224)) for w in (223, 447, 448, 2000)] == [1, 1, 2, 2]
    assert [reduction_for((w, 2000), (224, 224)) for w in (895, 896, 1792)] == [2, 4, 8]

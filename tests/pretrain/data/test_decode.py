"""Pixels and text from bytes: every mode upright over white, every damage with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decode import DecodeError, decode_image, decode_json, decode_text


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_rgb_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_modes(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    out = decode_image(encode(Image.new(mode, (4, 6)), kind))
    assert out.shape == (6, 4, 3) and out.dtype == np.uint8
    if mode in ("RGBA", "LA"):
        assert (out == 255).all()  # fully transparent: white


def test_palette_transparency_is_white():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 0)
    out = decode_image(encode(image, transparency=0))
    assert out[0, 0].tolist() == [255, 255, 255] and out[1, 1].tolist() == [200, 10, 10]


def test_sixteen_bit_grey_is_scaled():
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert decode_image(encode(image))[0, :, 0].tolist() == [0, 100, 255]


def test_exif_turns():
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(image, "JPEG", exif=exif)).shape == (4, 2, 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    out = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert out[0, 0].tolist() == [255, 0, 0]


def huge_png(side: int) -> bytes:
    """A header that promises side x side pixels, and hardly any behind it."""
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))):
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be decoded"),
        (b"GIF89a", "cannot be decoded"),
        (b"<html>404</html>", "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (encode(Image.new("RGB", (50, 50), "red"), "JPEG")[:-40], "cannot be decoded"),
        (encode(Image.effect_noise((50, 50), 50), "PNG")[:900], "cannot be decoded"),
        (huge_png(100_000), r"is over data\.max_pixels.*10000000000 pixels"),
        (huge_png(10_000), r"10000 x 10000 pixels is over data\.max_pixels=64000000"),
    ],
)
def test_bad_images(data, words):
    with pytest.raises(DecodeError, match=words):
        decode_image(data)


def test_cap_is_configurable():
    with pytest.raises(DecodeError, match="max_pixels=99"):
        decode_image(encode(Image.new("RGB", (10, 10))), max_pixels=99)


def test_text_and_json():
    assert decode_text("\ufeffÄ cat".encode()) == "Ä cat"
    assert decode_json(b'{"a": [1, 2.5]}') == {"a": [1, 2.5]}
    with pytest.raises(DecodeError, match=r"txt is not UTF-8 \(byte 0xff at 2\)"):
        decode_text(b"ab\xff")
    for bad in (b"{", b'{"a": NaN}', b"[Infinity]", b"1e999", b"\xff", b"[" * 100_000):
        with pytest.raises(DecodeError):
            decode_json(bad)

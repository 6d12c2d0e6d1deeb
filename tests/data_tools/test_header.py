"""The header parser against Pillow."""

import random

import pytest
from PIL import Image

from data_tools import _header, _peek
from pretrain.data.decode import DecodeError
from tests.data_tools import sets


def pictures() -> dict[str, bytes]:
    image = sets.pixels(1, 131, 77)
    exif = Image.Exif()
    exif[0x010E] = "x" * 5000
    return {
        "jpeg": sets.encoded(image),
        "progressive": sets.encoded(image, progressive=True),
        "grey": sets.encoded(image.convert("L")),
        "cmyk": sets.encoded(image.convert("CMYK")),
        "exif": sets.encoded(image, exif=exif),
        "icc": sets.encoded(image, icc_profile=b"p" * 70_000),
        "comment": sets.encoded(image, comment=b"c" * 900),
        **{f"png {mode}": sets.encoded(image.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")},
        "webp": sets.encoded(image, "WEBP", quality=60),
        "webp lossless": sets.encoded(image, "WEBP", lossless=True),
        "webp alpha": sets.encoded(image.convert("RGBA"), "WEBP", exif=exif),
        "webp animated": sets.encoded(image, "WEBP", save_all=True, append_images=[sets.pixels(2, 131, 77)]),
        "gif": sets.encoded(image, "GIF"),
        "bmp": sets.encoded(image, "BMP"),
        "tiff": sets.encoded(image, "TIFF"),
        "one": sets.encoded(sets.pixels(3, 1, 1)),
        "wide": sets.encoded(sets.pixels(3, 9000, 3), "PNG"),
    }


@pytest.mark.parametrize("name", pictures())
def test_header_is_pillows(name: str) -> None:
    data = pictures()[name]
    own = _peek.peek(lambda at, number: data[at : at + number], len(data))
    assert (own is None) == (name in ("gif", "bmp", "tiff"))
    assert own in (None, _header.read_header(data))
    assert _header.header_of(lambda at, number: data[at : at + number], len(data)) == _header.read_header(data)


def test_only_the_head_is_read() -> None:
    data = pictures()["icc"]
    asked: list[int] = []

    def read(at: int, number: int) -> bytes:
        asked.append(number)
        return data[at : at + number]

    assert _peek.peek(read, len(data)) == ("jpg", 131, 77)
    assert sum(asked) < 2000


def test_damaged_headers_never_give_another_size() -> None:
    """Where both have an opinion it is the same; the parser may say less about what comes after the header."""
    draw = random.Random(1)
    differ = 0
    for data in pictures().values():
        for _ in range(60):
            broken = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
            for _ in range(draw.choice([0, 1, 2])):
                broken[draw.randrange(min(len(broken), 700))] ^= 1 << draw.randrange(8)
            mine = _peek.peek(lambda at, number, b=bytes(broken): b[at : at + number], len(broken))
            try:
                theirs = _header.read_header(bytes(broken))
            except DecodeError:
                differ += mine is not None
                continue
            assert mine in (None, theirs)
    assert differ < 60, "headers that only Pillow refuses are rare"


def test_too_many_pixels_are_refused_from_the_header() -> None:
    data = bytearray(pictures()["jpeg"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(DecodeError, match="too many pixels"):
        _header.header_of(lambda at, number: bytes(data[at : at + number]), len(data))

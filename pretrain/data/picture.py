"""A picture that knows its upright size from its header and decodes as much of itself as is asked for.

JPEG goes through libjpeg-turbo either way: Pillow's (`exact`) and simplejpeg's (`fast`) give the same pixels at full
size, but simplejpeg fills numpy memory at once, and makes a picture of 1/2, 1/4 or 1/8 of the size straight from the
DCT coefficients. Scales between these have no SIMD code and cost more than they save: they are left out.
All other formats, and whatever simplejpeg does not take (CMYK, warnings in the stream), are Pillow's alone, which
measures within 16 % of the fastest library on PNG and WebP. Images are uint8 RGB [H, W, 3].
"""

import io
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data.decode import MAX_PIXELS, DecodeError, Pixels, decode_image, too_large

REDUCTIONS = (8, 4, 2)
_ORIENTATION = 0x0112  # EXIF
_TURNED = (5, 6, 7, 8)  # orientations in which height and width are exchanged


class Picture:
    """An encoded picture, or the pixels of one. `np.asarray(picture)` is the same as `picture.exact()`."""

    __slots__ = ("_data", "_exact", "_max_pixels", "_orientation", "_size")

    def __init__(self, data: bytes | Pixels, *, max_pixels: int = MAX_PIXELS) -> None:
        self._data = data if isinstance(data, bytes) else b""
        self._exact: Pixels | None = None if isinstance(data, bytes) else data
        self._max_pixels = max_pixels
        self._size: tuple[int, int] | None = None
        self._orientation = 0  # as in EXIF where simplejpeg decodes it; 0: only Pillow does

    @property
    def size(self) -> tuple[int, int]:
        """Return the upright width and height.

        Raises:
            DecodeError: no image, or one of more than `max_pixels`.
        """
        if self._size is None and self._exact is None:
            self._read_header()
        if self._size is None:
            height, width, _ = self.exact().shape
            self._size = width, height
        return self._size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (H, W, 3), as the decoded array has it."""
        width, height = self.size
        return height, width, 3

    dtype = np.dtype(np.uint8)  #: of the decoded array

    def exact(self) -> Pixels:
        """Return all pixels as Pillow decodes them.

        Raises:
            DecodeError: not an image, cut off, damaged, or larger than `max_pixels`.
        """
        if self._exact is None:
            self._exact = decode_image(self._data, max_pixels=self._max_pixels)
        return self._exact

    def fast(self, reduction: int = 1) -> tuple[Pixels, int]:
        """Return all pixels at 1/`reduction` (1, 2, 4, 8) of the size, sides rounded up, and the reduction.

        It is 1 in spite of what was asked for where only Pillow decodes the picture: another format, a rare JPEG.

        Raises:
            DecodeError: as `exact`.
        """
        width, height = self.size
        if not self._orientation:
            return self.exact(), 1
        if self._orientation in _TURNED:
            width, height = height, width
        least = {"min_width": -(-width // reduction), "min_height": -(-height // reduction)} if reduction > 1 else {}
        try:
            stored_HWC = simplejpeg.decode_jpeg(self._data, **least)
        except ValueError:  # strict: a warning too. Pillow says what is wrong, or that nothing is
            return self.exact(), 1
        return _upright(stored_HWC, self._orientation), reduction

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Pixels:  # noqa: FBT001 (numpy's protocol)
        return np.array(self.exact(), dtype=dtype)

    def _read_header(self) -> None:
        """Fill in size and orientation of a JPEG that simplejpeg decodes; leave others as they are."""
        if not self._data.startswith(b"\xff\xd8\xff"):
            return
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(self._data)
        except ValueError:
            return
        if colours not in ("YCbCr", "Gray", "RGB"):  # inks: Pillow knows Adobe's way of writing them
            return
        if not 0 < width * height <= self._max_pixels:
            raise too_large(width, height, self._max_pixels)
        self._orientation = _orientation(self._data)
        self._size = (height, width) if self._orientation in _TURNED else (width, height)


def reduction_for(size: tuple[int, int], least: tuple[float, float]) -> int:
    """Return the largest reduction that leaves width and height of a region at `least` so many pixels."""
    room = min(side / need for side, need in zip(size, least))
    return next((reduction for reduction in REDUCTIONS if reduction <= room), 1)


def _orientation(data: bytes) -> int:
    """Return the EXIF (or XMP) orientation as Pillow reads it; most pictures have neither, which is told at once."""
    if not _has_app1(data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
        raise DecodeError(f"image cannot be decoded ({type(error).__name__}: {error})"[:300]) from error
    return int(found) if found in range(1, 9) else 1


def _has_app1(data: bytes) -> bool:
    """Return whether a segment before the image data may hold EXIF or XMP; where the segments are odd, it may."""
    at, end = 2, len(data) - 4
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan
            return False
        if marker in (0xE1, 0xFF):
            return True
        at += 2 + (data[at + 2] << 8) + data[at + 3]
    return True


def _upright(stored_HWC: Pixels, orientation: int) -> Pixels:
    """Return pixels turned as EXIF says: 1 and 2 upright, 3 and 4 half round, 5-8 on their side; 2 4 5 7 mirrored."""
    if orientation in _TURNED:
        stored_HWC = stored_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        stored_HWC = stored_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        stored_HWC = stored_HWC[:, ::-1]
    return np.ascontiguousarray(stored_HWC)

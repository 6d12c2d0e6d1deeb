"""What an image's header says: format and size, without decoding a pixel."""

import io
import warnings

from PIL import Image

from data_tools._peek import Read, peek
from pretrain.data.decode import FORMATS, MAX_PIXELS, DecodeError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # else the lower-case name of the format


def read_header(data: bytes) -> tuple[str, int, int]:
    """Return (extension of the true format, width, height).

    Raises:
        DecodeError: not an image, or one with too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the cap below is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind, (width, height) = str(image.format), image.size
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
        raise DecodeError(f"image header cannot be read ({type(error).__name__})") from error
    return _capped(EXTENSIONS.get(kind, kind.lower()), width, height)


def header_of(read: Read, size: int) -> tuple[str, int, int]:
    """Return what `read_header` returns of an image of `size` bytes, reading no more of it than need be.

    Raises:
        DecodeError: not an image, or one with too many pixels.
    """
    found = peek(read, size)
    return read_header(read(0, size)) if found is None else _capped(*found)


def _capped(kind: str, width: int, height: int) -> tuple[str, int, int]:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"image has too many pixels ({width} x {height}, at most {MAX_PIXELS})")
    return kind, width, height

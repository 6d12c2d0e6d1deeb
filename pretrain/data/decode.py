"""Bytes to pixels and text: late, one at a time, capped from the header, every failure with its reason."""

import io
import json
import math
import warnings
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64_000_000  # 64 megapixels are 192 MB of RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  #: no plug-in that starts a program (EPS) is asked
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")  #: extensions taken for an image, in order


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason that quarantine.jsonl shows, cut to a line's length."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason if len(reason) <= 500 else f"{reason[:500]} ...")


class DecodeError(BadSample):
    """Bytes that are not what their extension says."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return an encoded image as uint8 RGB [H, W, 3], upright by its EXIF tag, transparency over white.

    An animation gives its first frame; 16-bit greys are scaled to 8. Pixels are counted from the header, before
    anything is decoded.

    Raises:
        DecodeError: not an image, cut off, damaged, or larger than `max_pixels`.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "half an image must be an error"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the cap below is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if not 0 < width * height <= max_pixels:
                    raise too_large(width, height, max_pixels)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return np.array(_rgb(image))
    except DecodeError:
        raise
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"image cannot be decoded (no known format; it begins with {data[:12]!r})") from error
    except Image.DecompressionBombError as error:
        raise DecodeError(f"image is over data.max_pixels={max_pixels} or Pillow's own limit ({error})") from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
        raise DecodeError(f"image cannot be decoded ({type(error).__name__}: {error})") from error


def too_large(width: int, height: int, max_pixels: int) -> DecodeError:
    """Return the error of an image whose header says more pixels than are allowed."""
    return DecodeError(f"image of {width} x {height} pixels is over data.max_pixels={max_pixels}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # convert() would clip at 255
        grey_HW = np.asarray(image).astype(np.int64)
        scaled_HW = np.clip(grey_HW, 0, 65535) // 257 if grey_HW.max(initial=0) > 255 or image.mode != "I" else grey_HW
        return Image.fromarray(scaled_HW.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear).convert("RGB")
    return image.convert("RGB")


def decode_text(data: bytes, *, name: str = "txt") -> str:
    """Return UTF-8 text.

    Raises:
        DecodeError: bytes that are not UTF-8; the message names the first bad one.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(f"{name} is not UTF-8 (byte {data[error.start]:#04x} at {error.start})") from error


def decode_json(data: bytes, *, name: str = "json") -> Any:
    """Return strict JSON: NaN and infinities are refused.

    Raises:
        DecodeError: not UTF-8, not JSON, or a number that is not finite.
    """
    try:
        return json.loads(decode_text(data, name=name), parse_constant=_refuse, parse_float=_finite)
    except DecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{name} is not JSON ({error})") from error


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is out of range")
    return value

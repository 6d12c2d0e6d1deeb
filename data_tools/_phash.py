"""The perceptual hash of an image: 64 signs of its lowest frequencies, nearly equal for pictures that look alike.

The definition is imagehash's `phash` (8 x 8 of the DCT of 32 x 32 greys, against their median). A JPEG is decoded at
the smallest of its own scales that holds 128 x 128: of 200 made-up photographs that changed 2 bits of 38, none of 162.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pretrain.data.decode import FORMATS, MAX_PIXELS, DecodeError, decode_image

SIDE, LOW = 32, 8
DRAFT = (4 * SIDE, 4 * SIDE)
CLOSE = 2  # steps (of 32) that the mean of red, green or blue may differ in pictures that look alike
FLAT = 6.0  # range of greys (of 255) below which the signs are noise

_N, _K = np.arange(SIDE), np.arange(LOW)
DCT_KN = 2 * np.cos(np.pi * _K[:, None] * (2 * _N[None] + 1) / (2 * SIDE))  # type II, not normalised
WEIGHTS = (1 << np.arange(63, -1, -1, dtype=np.uint64)).astype(np.uint64)


class Look(NamedTuple):
    """How a picture looks from afar."""

    hash: int  #: 64 bits
    colour: int  #: mean red, green and blue in 32 steps each, 15 bits: the hash is blind to colour


def look(data: bytes, *, exact: bool = False) -> Look | None:
    """Return how an encoded image looks, or None for a plain ground, whose hash would say nothing.

    `exact` decodes a JPEG in full.

    Raises:
        DecodeError: not an image, damaged, or with too many pixels.
    """
    image = _small(data, exact=exact)
    grey_HW = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    if grey_HW.max() - grey_HW.min() < FLAT:
        return None
    low_KK = DCT_KN @ grey_HW @ DCT_KN.T
    signs = (low_KK > np.median(low_KK)).reshape(-1)
    red, green, blue = (
        int(value) >> 3 for value in np.asarray(image.reduce(max(1, min(image.size) // 8))).mean((0, 1))
    )
    return Look(int(WEIGHTS[signs].sum(dtype=np.uint64)), red << 10 | green << 5 | blue)


def same_colour(one_P: NDArray[np.uint16], two_P: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Return which pairs of mean colours are close in each of red, green and blue."""
    close = np.ones(len(one_P), bool)
    for shift in (0, 5, 10):
        a, b = ((colour_P >> shift & 31).astype(np.int16) for colour_P in (one_P, two_P))
        close &= np.abs(a - b) <= CLOSE
    return close


def _small(data: bytes, *, exact: bool) -> Image.Image:
    """Return the picture as RGB, a JPEG no larger than need be."""
    if data[:3] != b"\xff\xd8\xff":
        return Image.fromarray(decode_image(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the cap below is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DecodeError(f"image has too many pixels ({image.width} x {image.height})")
                if not exact:
                    image.draft("RGB", DRAFT)
                return ImageOps.exif_transpose(image).convert("RGB")
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
        raise DecodeError(f"image cannot be decoded ({type(error).__name__}: {error})"[:300]) from error

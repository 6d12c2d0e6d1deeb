"""The perceptual hash of an image: 64 signs of its lowest frequencies, nearly equal for pictures that look alike.

The definition is imagehash's `phash` (8 x 8 of the DCT of 32 x 32 greys, against their median). A JPEG is decoded at
the smallest of its own scales that holds 64 x 64, which costs a few bits of difference at most and is far faster.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from pretrain.data.decode import FORMATS, MAX_PIXELS, DecodeError, decode_image

SIDE, LOW = 32, 8
DRAFT = (2 * SIDE, 2 * SIDE)
FLAT = 6.0  # range of greys (of 255) below which the signs are noise

_N, _K = np.arange(SIDE), np.arange(LOW)
DCT_KN = 2 * np.cos(np.pi * _K[:, None] * (2 * _N[None] + 1) / (2 * SIDE))  # type II, not normalised
WEIGHTS = (1 << np.arange(63, -1, -1, dtype=np.uint64)).astype(np.uint64)


def phash(data: bytes, *, exact: bool = False) -> int | None:
    """Return the hash of an encoded image, or None for a plain ground, whose hash would say nothing.

    `exact` decodes a JPEG in full.

    Raises:
        DecodeError: not an image, damaged, or with too many pixels.
    """
    grey_HW = np.asarray(_grey(data, exact=exact).resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    if grey_HW.max() - grey_HW.min() < FLAT:
        return None
    low_KK = DCT_KN @ grey_HW @ DCT_KN.T
    signs = (low_KK > np.median(low_KK)).reshape(-1)
    return int(WEIGHTS[signs].sum(dtype=np.uint64))


def _grey(data: bytes, *, exact: bool) -> Image.Image:
    if data[:3] != b"\xff\xd8\xff":
        return Image.fromarray(decode_image(data)).convert("L")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the cap below is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DecodeError(f"image has too many pixels ({image.width} x {image.height})")
                upright = b"Exif\0\0" not in data[:64]
                if not exact:
                    image.draft("L", DRAFT)
                grey = image.convert("L")
                return grey if upright else ImageOps.exif_transpose(grey)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
        raise DecodeError(f"image cannot be decoded ({type(error).__name__}: {error})"[:300]) from error

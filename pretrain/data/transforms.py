"""Pixels in, normalised pixels out: the exact evaluation transform, and augmentation as a function of a seed.

Letters: C H W = channels, height, width; images are uint8 [H, W, 3] before and float32 [3, S, S] after (S = size).
Evaluation equals open_clip's and torchvision's PIL path bit for bit (bicubic, shortest edge, centre crop, / 255,
normalise); transformers' PIL image processor to 1e-6, where the excess to crop is even (it floors, torchvision rounds).
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field, field_validator

from pretrain.config import Section
from pretrain.data.decode import MAX_PIXELS, BadSample, Pixels

Floats = NDArray[np.float32]
Size = tuple[int, int]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Augment(Section):
    """What training does to a picture; the defaults are open_clip's: a crop of 90-100 % of the area, nothing else."""

    scale: tuple[float, float] = (0.9, 1.0)  #: share of the area that a crop keeps
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  #: width / height of a crop
    flip: float = Field(default=0.0, ge=0, le=1)  #: probability of a mirror image
    rotate: float = Field(default=0.0, ge=0, le=180)  #: degrees, drawn from [-rotate, rotate]
    translate: float = Field(
        default=0.0, ge=0, le=1
    )  #: shift as a share of the side, drawn from [-translate, translate]
    zoom: tuple[float, float] = (1.0, 1.0)  #: scale of the whole picture; below 1 shows `fill` around it
    fill: int = Field(default=255, ge=0, le=255)  #: grey level of what rotate, translate and zoom uncover
    brightness: float = Field(default=0.0, ge=0)  #: factor drawn from [1 - x, 1 + x], as for the next two
    pivot: int = Field(
        default=0, ge=0, le=255
    )  #: grey that brightness keeps: 0 dims all, 255 leaves white grounds white
    contrast: float = Field(default=0.0, ge=0)
    saturation: float = Field(default=0.0, ge=0)
    hue: float = Field(default=0.0, ge=0, le=0.5)  #: turn of the colour circle, drawn from [-hue, hue]
    jitter: float = Field(default=1.0, ge=0, le=1)  #: probability that the four colour changes happen at all
    grey: float = Field(default=0.0, ge=0, le=1)  #: probability of a grey picture

    @field_validator("scale", "ratio", "zoom")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two positive numbers, the smaller first")
        return value

    def moving(self) -> list[str]:
        """Return the keys that were set to move pixels about; the default crop counts as not set."""
        still: dict[str, tuple[object, ...]] = {
            "scale": ((0.9, 1.0), (1.0, 1.0)), "ratio": ((3 / 4, 4 / 3), (1.0, 1.0)), "zoom": ((1.0, 1.0),),
            "flip": (0,), "rotate": (0,), "translate": (0,),
        }  # fmt: skip
        return [name for name, values in still.items() if getattr(self, name) not in values]


LUMA_C = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Transform:
    """Turns a decoded picture into what the vision tower reads."""

    def __init__(
        self,
        size: int,
        *,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        resize_mode: Literal["shortest", "squash"] = "shortest",
    ) -> None:
        self.size = size
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self._filter = _FILTERS[interpolation]
        self._mean_C11 = np.array(mean, dtype=np.float32)[:, None, None]
        self._std_C11 = np.array(std, dtype=np.float32)[:, None, None]

    def evaluate(self, image_HWC: Pixels) -> Floats:
        """Return float32 [3, S, S]: resized, cropped at the centre, normalised. No randomness.

        Raises:
            BadSample: so narrow that its resized length is beyond memory.
        """
        image = Image.fromarray(image_HWC)
        if self.resize_mode == "squash":
            return self._normalise(_resize(image, (self.size, self.size), self._filter))
        width, height = image.size
        short, long = min(width, height), max(width, height)
        scaled = int(self.size * long / short)
        if scaled * self.size > MAX_PIXELS:  # a line of one pixel would grow to gigabytes
            raise BadSample(f"image of {width} x {height} pixels is too narrow to be resized to {self.size}")
        image = _resize(image, (self.size, scaled) if width <= height else (scaled, self.size), self._filter)
        left, top = (round((side - self.size) / 2) for side in image.size)  # half to even, as torchvision
        return self._normalise(image.crop((left, top, left + self.size, top + self.size)))

    def train(self, image_HWC: Pixels, augment: Augment, rng: np.random.Generator) -> Floats:
        """Return float32 [3, S, S]: one augmented view; equal generators give equal views."""
        image = affine(Image.fromarray(image_HWC), augment, rng)
        image = crop(image, augment, rng, self.size, self._filter)
        return self._normalise(colour(flip(image, augment, rng), augment, rng))

    def whole(self, image_HWC: Pixels, augment: Augment | None, rng: np.random.Generator) -> Floats:
        """Return float32 [3, S, S]: all of the picture squashed to the square, so that boxes in [0, 1] stay right.

        Of `augment`, the colour changes happen; nothing moves.
        """
        image = _resize(Image.fromarray(image_HWC), (self.size, self.size), self._filter)
        return self._normalise(image if augment is None else colour(image, augment, rng))

    def _normalise(self, image: Image.Image) -> Floats:
        out_CHW = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
        out_CHW /= 255.0
        out_CHW -= self._mean_C11
        out_CHW /= self._std_C11
        return out_CHW


def generator(draw: int) -> np.random.Generator:
    """Return the generator of one sample's draws."""
    return np.random.Generator(np.random.Philox(key=draw))


def _resize(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def affine(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """Turn, shift and zoom about the centre, bilinearly; what is uncovered gets the fill colour."""
    if not (augment.rotate or augment.translate or augment.zoom != (1.0, 1.0)):
        return image
    width, height = image.size
    angle = math.radians(_between(rng, -augment.rotate, augment.rotate))
    zoom = math.exp(_between(rng, *(math.log(z) for z in augment.zoom)))
    shift_x = width * _between(rng, -augment.translate, augment.translate)
    shift_y = height * _between(rng, -augment.translate, augment.translate)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = width / 2, height / 2  # Pillow wants the map from output to input
    matrix = (
        cos, sin, x - cos * (x + shift_x) - sin * (y + shift_y),
        -sin, cos, y + sin * (x + shift_x) - cos * (y + shift_y),
    )  # fmt: skip
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(augment.fill,) * 3
    )


def crop(
    image: Image.Image, augment: Augment, rng: np.random.Generator, size: int, resample: Image.Resampling
) -> Image.Image:
    """Cut a random part (area and aspect drawn from `scale` and `ratio`) and resize it to the square."""
    width, height = image.size
    for _ in range(10):
        area = width * height * _between(rng, *augment.scale)
        aspect = math.exp(_between(rng, math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # the largest centred part of a legal aspect
        aspect = min(max(width / height, augment.ratio[0]), augment.ratio[1])
        w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
        return _resize(_cut(image, (width - w) // 2, (height - h) // 2, w, h), (size, size), resample)
    left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
    return _resize(_cut(image, left, top, w, h), (size, size), resample)


def _cut(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def flip(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """Mirror left and right."""
    return ImageOps.mirror(image) if augment.flip and rng.random() < augment.flip else image


def colour(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """Change hue, saturation, contrast and brightness: one linear map, applied once (Pillow clips the result)."""
    amounts = (augment.brightness, augment.contrast, augment.saturation)
    if not (any(amounts) or augment.hue or augment.grey):
        return image
    light, contrast, saturation = (_between(rng, max(0.0, 1 - x), 1 + x) for x in amounts)
    turn = 2 * math.pi * _between(rng, -augment.hue, augment.hue)
    jittered, grey = rng.random() < augment.jitter, rng.random() < augment.grey
    if not jittered:
        light, contrast, saturation, turn = 1.0, 1.0, 1.0, 0.0
    map_CC = _hue(turn)
    saturation = 0.0 if grey else saturation
    map_CC = np.float32(saturation) * map_CC + np.float32(1 - saturation) * (LUMA_C @ map_CC)
    offset = light * (1 - contrast) * _mean_luma(image) if contrast != 1.0 else 0.0
    offset += (1 - light) * augment.pivot
    rows = np.concatenate([light * contrast * map_CC, np.full((3, 1), offset)], axis=1)
    return image.convert("RGB", tuple(rows.ravel().tolist()))


def _hue(turn: float) -> Floats:
    """Return the rotation of RGB about the grey axis, which keeps greys, by an angle in radians."""
    cos, sin = math.cos(turn), math.sin(turn) / math.sqrt(3)
    rest = (1 - cos) / 3
    rows = [
        [cos + rest, rest - sin, rest + sin],
        [rest + sin, cos + rest, rest - sin],
        [rest - sin, rest + sin, cos + rest],
    ]
    return np.array(rows, dtype=np.float32)


def _mean_luma(image: Image.Image) -> float:
    return float(np.asarray(image.convert("L")).mean())

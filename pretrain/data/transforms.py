"""A picture to the square that a tower reads: the exact evaluation transform, and augmentation as a function of a seed.

Letters: C H W = channels, height, width; images are uint8, [H, W, 3] before and [S, S, 3] after (S = size).
`exact` is Pillow all the way. Evaluation then equals open_clip's and torchvision's PIL path bit for bit, once the tower
has normalised it (bicubic, shortest edge, centre crop); transformers' PIL image processor to 1e-6, where the excess to
crop is even (it floors, torchvision rounds).
Not exact, a view is drawn from the header, decoded at the smallest size that has a pixel for every pixel of the crop,
and resized by torch. It shows the same crop. In steps of 255 it is off by at most 5, and 0.3 in the mean, where all
pixels are decoded (usual: 1 and 0.002); by at most 90, and 7 in the mean, where a JPEG is decoded at 1/2, 1/4 or 1/8
(usual: 18 and 1.5), as a border of the crop moves by up to half a decoded pixel. The tests hold FULL and REDUCED to
these bounds; 780 random views of photograph-like JPEG of all sizes and subsamplings had 4, 0.24, 64 and 6.1 at worst.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field, field_validator

from pretrain.config import Section
from pretrain.data.decode import MAX_PIXELS, BadSample, Pixels
from pretrain.data.picture import Picture, reduction_for
from pretrain.data.resize import Interpolation, resize

Decode = Literal["fast", "exact"]
Size = tuple[int, int]  #: width, height

LUMA_C = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Bound(NamedTuple):
    """How far a fast view may be from the exact one, in steps of 255."""

    largest: int
    mean: float


FULL = Bound(largest=5, mean=0.3)
REDUCED = Bound(largest=90, mean=7.0)


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


class Warp(NamedTuple):
    """A turn, a zoom and a shift about the centre."""

    angle: float  #: radians
    zoom: float
    shift_x: float  #: share of the width
    shift_y: float


class Tint(NamedTuple):
    """A change of colours."""

    light: float
    contrast: float
    saturation: float
    turn: float  #: radians around the colour circle


class View(NamedTuple):
    """One drawn way of looking at a picture: known from its size alone, before anything is decoded."""

    warp: Warp | None
    box: tuple[int, int, int, int]  #: left, top, width, height of the crop, in pixels of the whole picture
    mirror: bool
    tint: Tint | None


class Transform:
    """Turns a picture into the pixels that a vision tower reads: uint8 [S, S, 3], normalised there."""

    def __init__(
        self,
        size: int,
        *,
        interpolation: Interpolation = "bicubic",
        resize_mode: Literal["shortest", "squash"] = "shortest",
    ) -> None:
        self.size = size
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self._filter = _FILTERS[interpolation]

    def sized(self, size: int | None) -> "Transform":
        """Return the transform to squares of `size` pixels; None: this one."""
        return self if size is None else Transform(size, interpolation=self.interpolation, resize_mode=self.resize_mode)

    def evaluate(self, image: Pixels | Picture, *, exact: bool = True) -> Pixels:
        """Return uint8 [S, S, 3]: resized and cropped at the centre. No randomness.

        Raises:
            BadSample: so narrow that its resized length is beyond memory, or not to be decoded.
        """
        picture = image if isinstance(image, Picture) else Picture(image)
        width, height = self._scaled(*picture.size)
        if exact:
            scaled = _resize(Image.fromarray(picture.exact()), (width, height), self._filter)
        else:
            image_HWC, _ = picture.fast(reduction_for(picture.size, (width, height)))
            whole = (0, 0, image_HWC.shape[1], image_HWC.shape[0])
            scaled = Image.fromarray(resize(image_HWC, whole, (width, height), self.interpolation))
        left, top = (round((side - self.size) / 2) for side in (width, height))  # half to even, as torchvision
        return np.asarray(_cut(scaled, left, top, self.size, self.size))

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which an evaluated picture is resized before the crop."""
        if self.resize_mode == "squash":
            return self.size, self.size
        long = int(self.size * max(width, height) / min(width, height))
        if long * self.size > MAX_PIXELS:  # a line of one pixel would grow to gigabytes
            raise BadSample(f"image of {width} x {height} pixels is too narrow to be resized to {self.size}")
        return (self.size, long) if width <= height else (long, self.size)

    def train(
        self, image: Pixels | Picture, augment: Augment, rng: np.random.Generator, *, exact: bool = False
    ) -> Pixels:
        """Return uint8 [S, S, 3]: one augmented view; equal generators give equal views."""
        picture = image if isinstance(image, Picture) else Picture(image)
        return self._seen(picture, draw(picture.size, augment, rng), augment, exact=exact)

    def whole(
        self, image: Pixels | Picture, augment: Augment | None, rng: np.random.Generator, *, exact: bool = False
    ) -> Pixels:
        """Return uint8 [S, S, 3]: all of the picture squashed to the square, so that boxes in [0, 1] stay right.

        Of `augment`, the colour changes happen; nothing moves.
        """
        picture = image if isinstance(image, Picture) else Picture(image)
        augment = augment or Augment()
        view = View(None, (0, 0, *picture.size), mirror=False, tint=_draw_tint(augment, rng))
        return self._seen(picture, view, augment, exact=exact)

    def _seen(self, picture: Picture, view: View, augment: Augment, *, exact: bool) -> Pixels:
        seen = self._exactly(picture, view, augment) if exact else self._fast(picture, view, augment)
        return seen if view.tint is None else np.asarray(colour(Image.fromarray(seen), view.tint, augment.pivot))

    def _exactly(self, picture: Picture, view: View, augment: Augment) -> Pixels:
        image = Image.fromarray(picture.exact())
        if view.warp is not None:
            image = affine(image, view.warp, augment.fill)
        image = _resize(_cut(image, *view.box), (self.size, self.size), self._filter)
        return np.asarray(ImageOps.mirror(image) if view.mirror else image)

    def _fast(self, picture: Picture, view: View, augment: Augment) -> Pixels:
        zoom = 1.0 if view.warp is None else view.warp.zoom
        need = self.size * max(zoom, 1.0)  # a zoom shows fewer pixels of the picture in the same crop
        image_HWC, reduction = picture.fast(reduction_for(view.box[2:], (need, need)))
        if view.warp is not None:
            image_HWC = np.asarray(affine(Image.fromarray(image_HWC), view.warp, augment.fill))
        left, top, width, height = (side / reduction for side in view.box)
        return resize(
            image_HWC, (left, top, width, height), (self.size, self.size), self.interpolation, mirror=view.mirror
        )


def generator(draw: int) -> np.random.Generator:
    """Return the generator of one sample's draws."""
    return np.random.Generator(np.random.Philox(key=draw))


def draw(size: Size, augment: Augment, rng: np.random.Generator) -> View:
    """Return the view of a picture of (width, height) that the generator's next numbers say."""
    warp = _draw_warp(augment, rng)
    box = _draw_box(*size, augment, rng)
    mirror = bool(augment.flip and rng.random() < augment.flip)
    return View(warp, box, mirror, _draw_tint(augment, rng))


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _draw_warp(augment: Augment, rng: np.random.Generator) -> Warp | None:
    if not (augment.rotate or augment.translate or augment.zoom != (1.0, 1.0)):
        return None
    angle = math.radians(_between(rng, -augment.rotate, augment.rotate))
    zoom = math.exp(_between(rng, *(math.log(z) for z in augment.zoom)))
    shift_x, shift_y = (_between(rng, -augment.translate, augment.translate) for _ in range(2))
    return Warp(angle, zoom, shift_x, shift_y)


def _draw_box(width: int, height: int, augment: Augment, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a random part of the picture, its area and aspect drawn from `scale` and `ratio`."""
    for _ in range(10):
        area = width * height * _between(rng, *augment.scale)
        aspect = math.exp(_between(rng, math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
    # the largest centred part of a legal aspect
    aspect = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (width - w) // 2, (height - h) // 2, w, h


def _draw_tint(augment: Augment, rng: np.random.Generator) -> Tint | None:
    amounts = (augment.brightness, augment.contrast, augment.saturation)
    if not (any(amounts) or augment.hue or augment.grey):
        return None
    light, contrast, saturation = (_between(rng, max(0.0, 1 - x), 1 + x) for x in amounts)
    turn = 2 * math.pi * _between(rng, -augment.hue, augment.hue)
    jittered, grey = rng.random() < augment.jitter, rng.random() < augment.grey
    if not jittered:
        light, contrast, saturation, turn = 1.0, 1.0, 1.0, 0.0
    return Tint(light, contrast, 0.0 if grey else saturation, turn)


def _resize(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)


def _cut(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def affine(image: Image.Image, warp: Warp, fill: int) -> Image.Image:
    """Turn, zoom and shift about the centre, bilinearly; what is uncovered gets the grey level `fill`."""
    width, height = image.size
    shift_x, shift_y = width * warp.shift_x, height * warp.shift_y
    cos, sin = math.cos(warp.angle) / warp.zoom, math.sin(warp.angle) / warp.zoom
    x, y = width / 2, height / 2  # Pillow wants the map from output to input
    matrix = (
        cos, sin, x - cos * (x + shift_x) - sin * (y + shift_y),
        -sin, cos, y + sin * (x + shift_x) - cos * (y + shift_y),
    )  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3)


def colour(image: Image.Image, tint: Tint, pivot: int) -> Image.Image:
    """Change hue, saturation, contrast and brightness: one linear map, applied once (Pillow clips the result)."""
    light, contrast, saturation = tint.light, tint.contrast, np.float32(tint.saturation)
    map_CC = _hue(tint.turn)
    map_CC = saturation * map_CC + np.float32(1 - tint.saturation) * (LUMA_C @ map_CC)
    offset = light * (1 - contrast) * _mean_luma(image) if contrast != 1.0 else 0.0
    offset += (1 - light) * pivot
    rows = np.concatenate([light * contrast * map_CC, np.full((3, 1), offset)], axis=1)
    return image.convert("RGB", tuple(rows.ravel().tolist()))


def _hue(turn: float) -> NDArray[np.float32]:
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

"""Pictures that compress like photographs: smooth shades, textures that fall off as 1/f, edges, a little sensor noise.

The real photographs that scikit-learn carries take 22 and 32 kB at 256 x 256 and quality 95; these take 20 to 30.
Letters: H W = height, width; f = spatial frequency.
"""

import io

import numpy as np
from PIL import Image

NAMES = ("dog", "harbour", "old bridge", "market", "child", "mountain lake", "red bicycle", "kitchen", "crowd", "owl")
PLACES = ("in the rain", "at night", "near the coast", "on a sunny day", "behind a window", "in black and white")


def photograph(width: int, height: int, *, seed: int) -> Image.Image:
    """Return one picture; equal arguments give equal pixels."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    f_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    f_HW[0, 0] = 1.0

    def field(fall: float) -> np.ndarray:
        waves = (rng.standard_normal(f_HW.shape) + 1j * rng.standard_normal(f_HW.shape)) / f_HW**fall
        waves[0, 0] = 0
        out_HW = np.fft.irfft2(waves, s=(height, width))
        return out_HW / out_HW.std()

    light_HW, blue_HW, red_HW, relief_HW = field(1.45), field(1.8), field(1.8), field(2.2)
    for _ in range(4):  # objects: regions of another shade, colour and roughness
        inside_HW = relief_HW > rng.normal(0, 0.8)
        light_HW = np.where(inside_HW, light_HW * rng.uniform(0.2, 1.1) + rng.normal(0, 0.7), light_HW)
        blue_HW, red_HW = (np.where(inside_HW, c * 0.5 + rng.normal(0, 0.6), c) for c in (blue_HW, red_HW))
    y_HW = 118 + 45 * light_HW + 1.2 * rng.standard_normal((height, width))
    blue_HW, red_HW = 14 * blue_HW, 14 * red_HW
    rgb = (y_HW + 1.402 * red_HW, y_HW - 0.344 * blue_HW - 0.714 * red_HW, y_HW + 1.772 * blue_HW)
    return Image.fromarray(np.clip(np.stack(rgb, axis=-1), 0, 255).astype(np.uint8))


def jpeg(width: int, height: int, *, seed: int, quality: int, subsampling: int = 2, **options: object) -> bytes:
    """Return a photograph as a JPEG file; subsampling 0, 1, 2 is 4:4:4, 4:2:2, 4:2:0."""
    buffer = io.BytesIO()
    image = photograph(width, height, seed=seed)
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, **options)
    return buffer.getvalue()


def caption(seed: int) -> str:
    """Return a sentence of the usual length."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    subject, place = NAMES[int(rng.integers(len(NAMES)))], PLACES[int(rng.integers(len(PLACES)))]
    return f"A photo of a {subject} {place}, taken by {NAMES[int(rng.integers(len(NAMES)))].title()} no. {seed}"

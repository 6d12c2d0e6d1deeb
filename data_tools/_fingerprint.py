"""What makes a sample recognisable: hashes of its image's bytes, of how it looks, and of its caption."""

from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools import _minhash, _pack, _phash, _tar
from pretrain.data import headers
from pretrain.data.decode import BadSample

VERSION = 1
NONE = 0  # the mark of what a sample does not have


class Ask(NamedTuple):
    """What a worker is told."""

    path: Path
    looks: bool = True
    bands: bool = False


def fingerprints(asked: Ask) -> bytes:
    """Return, for each sample of a shard, its marks; NONE where it has no image, no look or no caption."""
    images, looks, colours, captions, pixels, bands = [], [], [], [], [], []
    texts: list[str] = []
    bad = 0
    with _tar.opened(asked.path) as tar:
        for entry in headers.entries_of(asked.path):
            image, look, area = NONE, None, 0
            try:
                data = tar.image(entry)
                image = _mark(data)
                _, width, height, _ = tar.picture(entry)
                area = width * height
                if asked.looks:
                    look = _phash.look(data)
            except BadSample:
                bad += 1
            try:
                text = _minhash.plain(tar.captions(entry)[0])
            except BadSample:
                text = ""
            images.append(image)
            looks.append(look.hash if look else NONE)
            colours.append(look.colour if look else 0)
            pixels.append(area)
            captions.append(_mark(text.encode("utf-8", "surrogateescape")) if text else NONE)
            texts.append(text)
            if asked.bands:
                bands.append(_minhash.bands(text))
    marks = {"images": images, "looks": looks, "colours": colours, "captions": captions, "pixels": pixels}
    arrays = {name: np.array(values, np.uint64) for name, values in marks.items()}
    if asked.bands:
        arrays["bands"] = np.array(bands, np.uint64).reshape(-1, _minhash.BANDS)
    return _pack.pack({"bad": bad, "texts": texts if asked.bands else []}, **arrays)


def _mark(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest()) or 1

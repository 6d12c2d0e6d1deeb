"""What tests of data_tools share: small pictures, and what shards hold."""

import io
from pathlib import Path

from PIL import Image

from pretrain.data import format as shards


def small(number: int, kind: str = "PNG") -> bytes:
    """Return the bytes of an 8 x 6 picture whose colour is its number."""
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256 % 256, 99)).save(out, kind)
    return out.getvalue()


def read(folder: Path, pattern: str = "*.tar") -> dict[str, dict[str, bytes]]:
    """Return {key: members} of all shards of a folder."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        with open(path, "rb") as file:
            found.update({e.key: shards.read_members(file, e) for e in shards.read_index(path)})
    return found

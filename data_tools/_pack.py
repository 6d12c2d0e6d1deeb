"""What a worker hands back: a JSON tree and some arrays in one string of bytes, read without pickle."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

TREE = "tree"


def pack(tree: Any, **arrays: NDArray[Any]) -> bytes:
    """Return a tree and arrays as bytes."""
    out = io.BytesIO()
    np.savez(out, **{TREE: np.frombuffer(json.dumps(tree).encode(), np.uint8)}, **arrays)
    return out.getvalue()


def unpack(data: bytes) -> tuple[Any, Mapping[str, NDArray[Any]]]:
    """Return the tree and the arrays."""
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    return json.loads(arrays.pop(TREE).tobytes()), arrays

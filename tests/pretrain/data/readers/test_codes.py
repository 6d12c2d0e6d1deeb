"""Codes of an image tokenizer: from bytes, .npy and json the same symbols."""

import io

import numpy as np
import pytest

from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from pretrain.data.symbols import plain
from tests.tiny import record

CODES = np.array([[3, 0], [8191, 7]], dtype=np.uint16)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("members", [
    {"codes": CODES.astype("<u2").tobytes()}, {"codes": npy(CODES)}, {"codes.npy": npy(CODES)},
    {"json": {"codes": [3, 0, 8191, 7]}},
], ids=lambda members: next(iter(members)))  # fmt: skip
def test_forms(members):
    found = base.make({"codes": {}}).read(record(**members))
    assert plain(found.suffix) == "<code_3> <code_0> <code_8191> <code_7>" and found.codes and len(found.images) == 1


def test_a_caption_and_no_picture():
    found = base.make({"codes": {"image": None, "text": ["txt"]}}).read(record(codes=npy(CODES), txt=b"a cat"))
    assert found.prefix == "a cat" and not found.images


@pytest.mark.parametrize("members, message", [
    ({}, "no codes"),
    ({"codes": b"abc"}, "3 bytes"),
    ({"codes": npy(CODES.astype(np.int64))}, "int64, expected uint16"),
    ({"codes": b"\x93NUMPYjunk"}, "no .npy"),
    ({"json": {"codes": [70000]}}, "no codes"),
])  # fmt: skip
def test_broken_codes_are_a_reason(members, message):
    with pytest.raises(BadSample, match=message):
        base.make({"codes": {}}).read(record(**members))

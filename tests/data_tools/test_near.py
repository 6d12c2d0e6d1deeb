"""Perceptual hashes against imagehash, near pairs against all pairs, MinHash against Jaccard, and who stays."""

import contextlib
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_tools import _duplicates, _minhash, _near, _phash
from pretrain.data.decode import DecodeError
from tests.benchmarks.data_tools import photo
from tests.data_tools import sets


def reference(data: bytes) -> int:
    imagehash = pytest.importorskip("imagehash", reason="the extra `dev` is not installed")
    return int(str(imagehash.phash(Image.open(io.BytesIO(data)))), 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_hash_is_imagehashs(kind: str) -> None:
    for seed in range(20):
        data = photo(seed) if kind == "JPEG" else sets.encoded(sets.pixels(seed, 200 + 37 * seed % 300, 190), kind)
        exact, fast, other = _phash.look(data, exact=True), _phash.look(data), reference(data)
        assert exact.hash == other
        assert (fast.hash ^ other).bit_count() <= 4, "a JPEG at a smaller scale may differ in a few bits"


def test_copies_are_near_and_others_are_not() -> None:
    looks = []
    for seed in range(12):
        image = sets.pixels(seed, 320, 240)
        smaller = image.resize((200, 150))
        brighter = ImageEnhance.Brightness(image).enhance(1.06)
        first, *copies = (
            _phash.look(data)
            for data in (
                sets.encoded(image, quality=95),
                sets.encoded(image, quality=40),
                sets.encoded(smaller),
                sets.encoded(smaller, "WEBP"),
                sets.encoded(brighter),
            )
        )
        assert all((first.hash ^ copy.hash).bit_count() <= 4 for copy in copies)
        looks.append(first)
    far = [(a.hash ^ b.hash).bit_count() for i, a in enumerate(looks) for b in looks[:i]]
    assert min(far) > 12


def test_plain_grounds_colours_and_turned_pictures() -> None:
    assert _phash.look(sets.encoded(Image.new("RGB", (90, 60), (200, 10, 10)))) is None
    red, blue = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    red.paste((220, 0, 0), (8, 8, 40, 56))
    blue.paste((0, 105, 220), (8, 8, 40, 56))  # the same grey
    hashes = [_phash.look(sets.encoded(image, "PNG")) for image in (red, blue)]
    looks, colours = (np.array(values) for values in zip(*hashes))
    assert int(looks[0] ^ looks[1]).bit_count() <= 8
    wide = _duplicates.image_criterion(looks.astype(np.uint64), colours.astype(np.uint64), 8)
    assert not wide.near, "the hash is blind to colour, the criterion is not"
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = sets.pixels(5, 120, 80)
    turned = sets.encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert (_phash.look(turned).hash ^ _phash.look(sets.encoded(upright)).hash).bit_count() <= 4
    with pytest.raises(DecodeError):
        _phash.look(b"\xff\xd8\xffjunk")
    with pytest.raises(DecodeError):
        _phash.look(sets.encoded(upright)[:-200])


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
@pytest.mark.parametrize("number", [40, 900])
def test_near_pairs_are_all_pairs(distance: int, number: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 63, number // 2, dtype=np.uint64) * np.uint64(2)
    flips = [sum(1 << b for b in rng.choice(64, rng.integers(0, 10), replace=False)) for _ in hashes]
    hashes = np.concatenate([hashes, hashes ^ np.array(flips, np.uint64)])
    rng.shuffle(hashes)
    wanted = [
        [i, j]
        for i in range(number)
        for j in range(i + 1, number)
        if int(hashes[i] ^ hashes[j]).bit_count() <= distance
    ]
    assert _near.pairs_within(hashes, distance).tolist() == wanted
    assert _near.pairs_within(hashes[:0], distance).tolist() == []


def test_similar_captions_are_found() -> None:
    draw = random.Random(0)
    words = [
        f"{a}{b}" for a in ("sun", "tree", "boat", "dog", "house", "lamp") for b in ("s", "let", "ed", "ing", "top")
    ]
    texts = [" ".join(draw.choices(words, k=10)) for _ in range(150)]
    texts += [text.replace(text.split()[4], "other", 1) for text in texts[:75]]
    bands = np.stack([_minhash.bands(text) for text in texts])
    found = {tuple(pair) for pair in _minhash.pairs_within(texts, bands, 0.7).tolist()}
    wanted = {(i, j) for i in range(225) for j in range(i + 1, 225) if _minhash.similarity(texts[i], texts[j]) >= 0.7}
    assert len(wanted) > 50
    assert found <= wanted
    assert len(found) > 0.97 * len(wanted)
    assert _minhash.plain("  A Dog,  on a BEACH! ") == "a dog on a beach"
    assert _minhash.similarity("a", "a") == 1


def alike(name: str, values: list[int], near: dict[int, list[int]] | None = None) -> _duplicates.Criterion:
    return _duplicates.Criterion(name, np.array(values), near or {})


def test_who_stays() -> None:
    order, none, every = np.arange(5), np.zeros(5, bool), np.ones(5, bool)
    chain = alike("image", [0, 1, 2, -1, -1], {0: [1], 1: [0, 2], 2: [1]})
    assert _duplicates.decide([chain], order, none, every)[0].tolist() == [-1, 0, -1, -1, -1], "2 is not like 0"
    assert _duplicates.decide([chain], order[::-1], none, every)[0].tolist() == [-1, 2, -1, -1, -1]
    stay = np.array([False, False, True, False, False])
    assert _duplicates.decide([chain], order, stay, every)[0].tolist() == [-1, 2, -1, -1, -1]
    words = alike("caption", [5, 5, 5, 5, 6])
    onto, why = _duplicates.decide([chain, words], order, none, every)
    assert onto.tolist() == [-1, 0, 0, 0, -1]
    assert why.tolist() == [-1, 0, 1, 1, -1]
    assert _duplicates.decide([chain, words], order, stay, stay)[0].tolist() == [2, 2, -1, 2, -1]
    both = _duplicates.decide_both([chain], alike("caption", [5, 6, 6, 5, 5]), order, none, every)[0]
    assert both.tolist() == [-1, -1, 1, -1, -1], "1 looks like 0 but says something else; 2 is like 1 in both"


def test_crowds_are_compared_too() -> None:
    """Hashes that agree in most bands: more of a key than are compared by shifting."""
    rng = np.random.default_rng(3)
    hashes = np.unique(rng.integers(0, 1 << 9, 300, dtype=np.uint64) << np.uint64(20))
    values = hashes.tolist()
    wanted = [[i, j] for j, b in enumerate(values) for i, a in enumerate(values[:j]) if (a ^ b).bit_count() <= 4]
    assert _near.pairs_within(hashes, 4).tolist() == sorted(wanted)


def test_damaged_pictures_are_bad_samples_and_nothing_else() -> None:
    draw = random.Random(2)
    image = sets.pixels(7, 90, 70)
    files = [sets.encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")]
    files.append(sets.encoded(image, progressive=True))
    for data in files:
        for _ in range(40):
            broken = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
            for _ in range(draw.randrange(4)):
                if broken:
                    broken[draw.randrange(len(broken))] = draw.randrange(256)
            with contextlib.suppress(DecodeError):
                _phash.look(bytes(broken))

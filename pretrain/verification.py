"""An export, as its own library reads it, against the model that it was made from.

Shapes: N = images, B = texts, T = tokens, E = joint embedding width, S = side of a picture in pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import index, synthetic
from pretrain.data.decode import BadSample
from pretrain.data.order import Place
from pretrain.data.readers import base as readers
from pretrain.data.shards import Store
from pretrain.data.tokenizer import clean
from pretrain.exports import base
from pretrain.exports.base import Reader, WritingReader
from pretrain.pretrained import Pretrained

TOLERANCE = 1e-5  #: on unit-norm features; on logits times the scale; of a writer, on logits over the largest
COSINE = 0.9999  #: between features of one picture prepared by them and by us
LINES = (
    "a photo of a cat",
    "Two dogs, running on the beach!",
    "it's 5 o'clock; we'll say they've won 42-17",
    "a red circle left of a blue square",
    "",
    "x",
    "ANTIDISESTABLISHMENTARIANISM",
    "word " * 200,  # longer than any context
)


class ExportError(RuntimeError):
    """An export that its own library reads differently; it is not kept."""


class Pairs:
    """Pictures and captions to compare on."""

    def __init__(self, pictures: list[Image.Image], captions: list[str]) -> None:
        self.pictures, self.captions = pictures, captions


def drawn(*, count: int = 8) -> Pairs:
    """Return drawn pictures of several sizes, and sentences that try the tokenizer."""
    rng = np.random.Generator(np.random.Philox(key=0))
    sizes = [(96, 96), (320, 240), (61, 200), (40, 40)]
    pictures = [
        synthetic.draw(label, size=256, rng=rng).resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC)
        for i, label in enumerate(synthetic.CLASSES[:count])
    ]
    return Pairs(pictures, [*LINES, *synthetic.CLASSES])


def real(shards: str, *, count: int = 32) -> Pairs:
    """Return the first pairs of shards, as the caption reader reads them; damaged samples are passed over.

    Raises:
        ConfigError: they hold no picture with a caption.
        ShardError: one cannot be read.
    """
    reader = readers.make({"caption": {}})
    pairs = Pairs([], [])
    catalog = index.resolve(shards)
    store = Store(catalog, seed=0)
    for shard, size in enumerate(catalog.sizes):
        for member in range(size):
            if len(pairs.captions) == count:
                return pairs
            try:
                found = reader.read(store.read(Place(0, 0, shard, member)))
                pairs.pictures.append(Image.fromarray(np.asarray(found.images[0])))
            except BadSample:
                continue
            pairs.captions.append(found.suffix)
    if not pairs.captions:
        raise ConfigError(f"--pairs {shards}: no sample has both a picture and a caption")
    return pairs


@torch.no_grad()
def verify(model: Pretrained, reader: Reader | WritingReader, pairs: Pairs) -> dict[str, float]:
    """Return the largest differences.

    Raises:
        ExportError: one is too large, or token ids differ; the message says which and where.
    """
    if isinstance(reader, WritingReader):
        return _verify_writing(model, reader, pairs)
    tokens_BT = _tokens(model, reader, [clean(line) for line in pairs.captions])
    ours_NCHW = torch.stack([base.our_pixels(model, picture) for picture in pairs.pictures])
    noise_NCHW = torch.randn(ours_NCHW.shape, generator=torch.Generator().manual_seed(0))
    both_NCHW = torch.cat([ours_NCHW, noise_NCHW])
    features = model.model(Batch(keys=[], image_NCHW=both_NCHW, tokens_BT=tokens_BT))
    image_NE, text_BE = reader.image(both_NCHW), reader.text(tokens_BT)
    logits_NB = features.scale * features.image @ features.text.T
    found = {
        "image_features": _apart(features.image, image_NE),
        "text_features": _apart(features.text, text_BE),
        "logits_over_scale": _apart(logits_NB, reader.scale * image_NE @ text_BE.T) / float(features.scale),
    }
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            raise ExportError(f"{name} differ by {difference:.2e} from the model's, over {TOLERANCE}")
    return {**found, **_processor(model, reader, pairs.pictures), "captions": float(len(tokens_BT))}


def _verify_writing(model: Pretrained, reader: WritingReader, pairs: Pairs) -> dict[str, float]:
    """Compare what is read of pictures and texts, and what may be written at each place."""
    batch, theirs = base.our_batch(model, pairs.pictures, pairs.captions), reader.batch(pairs.pictures, pairs.captions)
    others = theirs.tensors()
    for name, tensor in batch.tensors().items():
        if not torch.equal(tensor, others[name]):
            raise ExportError(f"{name} of the same pictures and texts differs from the model's")
    logits_BUV = model.model(batch).logits_BUV
    apart = _apart(logits_BUV, reader.logits(theirs)) / float(logits_BUV.abs().max())
    if not apart <= TOLERANCE:
        raise ExportError(f"logits differ by {apart:.2e} of the largest from the model's, over {TOLERANCE}")
    return {"logits": apart, "captions": float(len(batch))}


def _processor(model: Pretrained, reader: Reader, pictures: list[Image.Image]) -> dict[str, float]:
    """Compare from whole pictures on; where they crop a pixel beside us, the features say nothing about the export."""
    if reader.floors_crop:
        size = model.config.vision.image_size
        pictures = [p for p in pictures if _crops_alike(p, size)] or [p for p in drawn().pictures if p.size == (96, 96)]
    ours_NCHW = torch.stack([base.our_pixels(model, picture) for picture in pictures])
    theirs_NCHW = reader.pixels(pictures)
    if theirs_NCHW.shape != ours_NCHW.shape:
        raise ExportError(f"the processor makes pixels {list(theirs_NCHW.shape)}, ours {list(ours_NCHW.shape)}")
    cosine = float(F.cosine_similarity(reader.image(theirs_NCHW), reader.image(ours_NCHW)).min())
    if not cosine >= COSINE:
        raise ExportError(f"features of pictures prepared by the processor have cosine {cosine:.5f}, below {COSINE}")
    return {"pixels": _apart(ours_NCHW, theirs_NCHW), "cosine": cosine}


def _crops_alike(picture: Image.Image, size: int) -> bool:
    short, long = sorted(picture.size)
    excess = int(size * long / short) - size
    return round(excess / 2) == excess // 2


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _tokens(model: Pretrained, reader: Reader, lines: list[str]) -> Tensor:
    """Return our ids padded to the context length [B, T], having compared them up to the end token."""
    words, length = model.tokenizer, model.config.text.context_length
    ours, theirs = words.encode_batch(lines, length), reader.tokens(lines)
    for line, mine, other in zip(lines, ours, theirs):
        if mine != other[: len(mine)]:
            raise ExportError(f"token ids of {line[:60]!r} are {other[: len(mine)]}, ours {mine}")
    return torch.tensor([ids + [words.pad] * (length - len(ids)) for ids in ours])

"""Examples to token rows, rows to a Batch: which token sees what, and which one counts.

Letters: B = rows, N = images, C H W = channels, height, width, T = tokens, K = boxes.
Text is trimmed to the longest row of the batch. That is exact: causal text never looks right of its end token, and
`valid_BT` hides the padding from everything else.
"""

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from pretrain.batch import Batch, Example
from pretrain.data.decode import BadSample, Pixels
from pretrain.data.tokenizer import Tokenizer
from pretrain.dist import hash64

IGNORE = -100
CHARACTERS = 256  #: so many a token are read of a text; what is behind them would be cut off anyway, but cost time


@dataclass(slots=True)
class Row:
    """One transformed and tokenised sample."""

    key: str
    shard: str
    images: list[Pixels]  #: each uint8 [H, W, C]
    ids: list[int]
    blocks: list[int]
    labels: list[int]  #: the token itself where it counts, IGNORE elsewhere; models shift, rows do not
    caption: int
    draw: int
    target: int = -1
    boxes_K4: NDArray[np.float32] | None = None  #: what the model is shown: regions where a detector has looked
    region_KC: NDArray[np.float32] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


R = TypeVar("R", bound=Row)


class Composer:
    """Puts the text of examples together for causal towers: every token sees itself and what is before it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        beyond: int = 1,
        pictures: tuple[int, str] | None = None,
        regions: bool = False,
    ) -> None:
        """Compose for a model with places for `context_length` tokens, which writes `beyond` more.

        `pictures`: the most that it reads of a sample, and what to do about more; None: any number. `regions`: of a
        picture it sees what a detector has found, and nothing else.
        """
        tokenizer.wrap([], context_length)  # refuses a context without room for the specials
        self.pictures, self.regions = pictures, regions
        self.tokenizer = tokenizer
        self.context_length, self.beyond = context_length, beyond

    def row(self, example: Example, images: list[Pixels]) -> Row:
        """Return an example as a row; the prefix is given, the suffix and the end token are learned.

        Raises:
            BadSample: it has more pictures than the model reads.
        """
        most = CHARACTERS * self.context_length
        prefix = self.tokenizer.ids(example.prefix[:most]) if example.prefix else []
        ids = self.tokenizer.wrap([*prefix, *self.tokenizer.ids(example.suffix[:most])], self.context_length)
        given = len(prefix) + (self.tokenizer.start is not None)
        labels = [IGNORE if place < given else token for place, token in enumerate(ids)]
        return self._row(Row, example, images, ids=ids, blocks=[1] * len(ids), labels=labels)

    def _row(self, kind: type[R], example: Example, images: list[Pixels], **text: Any) -> R:
        """Return a row of its text, and of what an example says beside it."""
        if self.pictures is not None and len(images) > self.pictures[0]:
            raise BadSample(
                f"{len(images)} pictures, the model reads {self.pictures[0]} of a sample; {self.pictures[1]}"
            )
        if self.regions and images and example.region_KC is None:
            raise BadSample(
                "a picture without features of its regions, and model.vision.source=region sees nothing else; set "
                "regions with features beside the reader, or take a tower"
            )
        same = example.group or " ".join(f"{example.prefix} {example.suffix}".split()).lower()
        return kind(
            key=example.key,
            shard=example.shard,
            images=images,
            caption=hash64("caption", same),
            draw=example.draw,
            target=example.target,
            boxes_K4=example.boxes_K4 if example.regions_K4 is None else example.regions_K4,
            region_KC=example.region_KC,
            meta=example.meta,
            **text,
        )

    def collate(self, rows: list[Row]) -> Batch:
        """Return rows as a Batch; its text is as long as its longest row."""
        length = max(len(row.ids) for row in rows)
        images = [image_HWC for row in rows for image_HWC in row.images]
        owners = [number for number, row in enumerate(rows) for _ in row.images]
        boxes = [(number, row.boxes_K4) for number, row in enumerate(rows) if row.boxes_K4 is not None]
        regions = [row.region_KC for row in rows if row.region_KC is not None]
        valid_BT = torch.arange(length) < torch.tensor([[len(row.ids)] for row in rows])
        return Batch(
            keys=[row.key for row in rows],
            shards=[row.shard for row in rows],
            image_NCHW=_stack(images) if images else None,
            owner_N=torch.tensor(owners) if images else None,
            tokens_BT=padded([row.ids for row in rows], length, self.tokenizer.pad),
            blocks_BT=padded([row.blocks for row in rows], length, 1),
            valid_BT=valid_BT,
            labels_BT=padded([row.labels for row in rows], length, IGNORE),
            target_B=torch.tensor([row.target for row in rows]),
            caption_B=torch.tensor([row.caption for row in rows]),
            draw_B=torch.tensor([row.draw for row in rows]),
            boxes_K4=torch.from_numpy(np.concatenate([box for _, box in boxes])) if boxes else None,
            box_owner_K=torch.tensor([number for number, box in boxes for _ in box]) if boxes else None,
            region_KC=torch.from_numpy(np.concatenate(regions)) if regions else None,
            meta=[row.meta for row in rows],
        )


def _stack(images: list[Pixels]) -> Tensor:
    """Return images [H, W, C] as [N, C, H, W] with channels last in memory, which is how they come and are wanted.

    A worker writes them to shared memory at once, as torch's own collate does: what is sent is a handle.
    """
    shape = (len(images), *images[0].shape)
    out_NHWC = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:
        out_NHWC.set_(torch.UntypedStorage._new_shared(math.prod(shape)))  # type: ignore[call-overload]
    target_NHWC = out_NHWC.resize_(shape).numpy()
    for number, image_HWC in enumerate(images):
        assert image_HWC.dtype == target_NHWC.dtype, "towers normalise, transforms do not"
        target_NHWC[number] = image_HWC
    return out_NHWC.permute(0, 3, 1, 2)


def padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    """Return rows of numbers as int64 [rows, length], filled up with `value`."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)

"""The currencies of the data flow: Record (bytes), Example (one decoded sample), Batch (tensors).

Shapes: B = rows of the batch, N = images (a row may own several), C H W = channels, height, width,
E = joint width, T = tokens, U = tokens that a decoder reads, K = boxes (a row may own several); in region_KC and
pooled_NC, C = width of a feature. A model only ever sees a Batch.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Record:
    """One sample as it lies in a shard: raw bytes by extension."""

    key: str
    shard: str  #: the shard's path or URL
    fields: dict[str, bytes]  #: extension -> bytes, e.g. {"jpg": ..., "txt": ...}
    epoch: int = 0
    draw: int = 0  #: hash(seed, epoch, shard, key): all randomness of the sample derives from it


@dataclass(slots=True)
class Example:
    """One sample as a task sees it: images and text, before tokens."""

    key: str
    images: list[Any]  #: each a picture, decoded when it is needed (data.picture), or uint8 [H, W, 3]
    prefix: str = ""  #: text that is given (prompt, question)
    suffix: str = ""  #: text that is learned (caption, answer)
    group: str = ""  #: what makes two captions the same; empty: the caption itself
    target: int = -1  #: class index, where a task has classes
    boxes_K4: NDArray[np.float32] | None = None  #: x0 y0 x1 y1 in [0, 1] of the first image, upright and whole
    meta: dict[str, Any] = field(default_factory=dict)  #: the sample's json member, for evals and tasks
    draw: int = 0
    shard: str = ""  #: the shard's path, as in Record
    weight: float = 1.0  #: what its loss is multiplied with
    unlearned: int = 0  #: so many tokens of the suffix, from its beginning, carry no loss
    codes: bool = False  #: the suffix is codes of an image, not text
    codes_alone: bool = False  #: and its softmax is over codes and the tokenizer's specials alone
    hole: bool = False  #: the middle half of each side of its pictures is hidden
    candidates: tuple[str, ...] = ()  #: what the suffix may be, where it is one of a list
    prompt: str = "none"  #: what a decoder reads before the suffix: none, source, or source_end (with its end token)
    regions_K4: NDArray[np.float32] | None = None  #: as boxes_K4, where a detector has looked: what the model is shown
    region_KC: NDArray[np.float32] | None = None  #: the detector's feature of each region


@dataclass(slots=True)
class Batch:
    """Rows of a step on one rank. Optional fields are None where no reader or objective asks for them."""

    keys: list[str]
    image_NCHW: Tensor | None = None  #: uint8, channels last in memory; towers normalise it. Floats: normalised already
    hole_N: Tensor | None = None  #: bool, the middle half of each side is zeroed once it is normalised; None: none
    owner_N: Tensor | None = None  #: int64, the row that image n belongs to
    image_NE: Tensor | None = None  #: float32, unit-norm features that a frozen tower gave of the rows' one image each
    pooled_NC: Tensor | None = None  #: float32, what that tower's trunk gave before the projection
    tokens_BT: Tensor | None = None  #: int64, trimmed to the longest text of the rows
    blocks_BT: Tensor | None = None  #: int64, 1 opens a new attention block, 0 joins the last
    valid_BT: Tensor | None = None  #: bool, False on padding
    labels_BT: Tensor | None = None  #: int64, -100 where a token does not count
    decoder_tokens_BU: Tensor | None = None  #: int64, what a decoder reads: its start, then what it says but the last
    decoder_labels_BU: Tensor | None = (
        None  #: int64, what it says at each of these places; -100 where it does not count
    )
    codes_B: Tensor | None = None  #: bool, the decoder of this row writes image codes
    weight_B: Tensor | None = None  #: float32, what the row's loss is multiplied with; None: 1
    allowed_BU: Tensor | None = None  #: int64, the place in allowed_SV of what may stand there; None: all may
    allowed_SV: Tensor | None = None  #: bool, sets of tokens, the first that of all; not by rows
    target_B: Tensor | None = None  #: int64 class index
    caption_B: Tensor | None = None  #: int64 hash of what makes two captions equal
    source_B: Tensor | None = None  #: int64, the row's place in data.blend; None without a blend
    draw_B: Tensor | None = None  #: int64, the sample's hash, for draws on the device
    boxes_K4: Tensor | None = None  #: float32, x0 y0 x1 y1 in [0, 1] of the row's first image, which is shown whole
    box_owner_K: Tensor | None = None  #: int64, the row that box k belongs to
    region_KC: Tensor | None = None  #: float32, a detector's feature of each box
    meta: list[dict[str, Any]] = field(default_factory=list)  #: each row's json member, for evals
    shards: list[str] = field(default_factory=list)  #: each row's shard: (shard, key) names a sample
    bad: list[dict[str, str]] = field(default_factory=list)  #: samples replaced here: epoch, shard, key, reason
    part: int = 0  #: which mini-batch of the step this is: each has counts of its own, and their losses are added
    beside: "Batch | None" = None  #: the step's second mini-batch
    filler: int = 0  #: trailing rows that only make the ranks' batch counts equal; evals drop them

    def __len__(self) -> int:
        return len(self.keys)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that hold tensors, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, Tensor)}

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with all tensors on `device`."""
        moved: dict[str, Any] = {n: v.to(device, non_blocking=True) for n, v in self.tensors().items()}
        return replace(self, **moved, beside=self.beside and self.beside.to(device))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (DataLoader calls this by name)."""
        pinned: dict[str, Any] = {n: v.pin_memory() for n, v in self.tensors().items()}
        return replace(self, **pinned, beside=self.beside and self.beside.pin_memory())

    def minis(self) -> list["Batch"]:
        """Return the step's mini-batches: this one, and the one beside it."""
        return [self] if self.beside is None else [replace(self, beside=None), self.beside]

    def split(self, rows: int | None) -> list["Batch"]:
        """Return the mini-batches in parts of `rows` rows (the last may be shorter); None: as they are.

        Replaced samples go with the first part.
        """
        return [part for mini in self.minis() for part in mini._parts(rows or max(1, len(mini)))]

    def _parts(self, rows: int) -> list["Batch"]:
        starts = range(0, len(self), rows)
        return [self._rows(start, start + rows) for start in starts] if len(starts) > 1 else [self]

    def _rows(self, start: int, stop: int) -> "Batch":
        cut: dict[str, Any] = {}
        for name, value in self.tensors().items():
            if name == "allowed_SV":
                continue
            owner = self.owner_N if name in ("image_NCHW", "owner_N", "hole_N") else None
            owner = self.box_owner_K if name in ("boxes_K4", "box_owner_K", "region_KC") else owner
            mine = slice(start, stop) if owner is None else (owner >= start) & (owner < stop)
            cut[name] = value[mine] - start if name in ("owner_N", "box_owner_K") else value[mine]
        filler = max(0, min(stop, len(self)) - max(start, len(self) - self.filler))
        cut |= {name: getattr(self, name)[start:stop] for name in ("keys", "meta", "shards")}
        return replace(self, **cut, bad=[] if start else self.bad, filler=filler)

"""VL-T5's and VL-BART's prefixes, word for word: five tasks of pretraining and seven downstream (Cho et al. 2021,
arXiv:2102.02779, tables 1 and 12; strings as in its release).

    lm              caption, text              span prediction: A <extra_id_0> on a ...   -> <extra_id_0> cat ...
                    `noise: bart`              denoise text: A <mask> on a ...            -> the whole text
    itm             caption                    image text match: TEXT                     -> true, false
    vqa gqa visual7w    vqa                    vqa: QUESTION                              -> an answer
    refer           detection                  visual grounding: red car                  -> <vis_extra_id_5>
    ground_caption  detection                  caption region: <vis_extra_id_5>           -> red car
    caption         caption                    caption:                                   -> the caption
    nlvr            entailment, sentences      nlvr: SENTENCE                             -> true, false
    refcocog        grounding, with regions    visual grounding: PHRASE                   -> <vis_extra_id_5>
    vcr_qa          sentences (2 texts)        vcr qa question: Q answer: A               -> true, false
    vcr_qar         sentences (3 texts)        vcr qar question: Q answer: A rationale: R -> true, false
    translate       translate                  translate English to German: TEXT          -> the translation

Left the task, beside it the reader whose examples it takes. `<vis_extra_id_5>` is the sixth region that the model sees:
of `data.regions`, which for refer and ground_caption are those of the reader's objects in the same order; or a cell of
a grid (`grid`), one of those that a box covers by half.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pretrain.batch import Example
from pretrain.config import Section
from pretrain.data.boxes import cells
from pretrain.data.decode import BadSample
from pretrain.data.instructions import base
from pretrain.data.instructions.base import draw_one, draw_share, needed
from pretrain.data.negatives import Config as NegativesConfig
from pretrain.data.negatives import Negatives
from pretrain.data.spans import Style, corrupt
from pretrain.data.symbols import symbol
from pretrain.data.transforms import generator
from pretrain.dist import hash64

Task = Literal[
    "lm", "itm", "vqa", "gqa", "visual7w", "refer", "ground_caption",
    "caption", "nlvr", "refcocog", "vcr_qa", "vcr_qar", "translate",
]  # fmt: skip

LM: dict[str, str] = {"t5": "span prediction:", "bart": "denoise text:"}
NOISE: dict[str, Style] = {"t5": "vl_t5", "bart": "vl_bart"}
ITM = "image text match:"
REFER = "visual grounding:"
GROUND_CAPTION = "caption region:"
CAPTION = "caption:"
VCR: dict[str, str] = {
    "vcr_qa": "vcr qa question: {} answer: {}",
    "vcr_qar": "vcr qar question: {} answer: {} rationale: {}",
}
REGIONS = 100  # that there are sentinels for
NEAR = 0.5  # a region this much like a box stands for it: intersection over union; of a cell, the share that is covered


class Config(Section):
    """`data.instruction.vlt5`."""

    tasks: list[Task] = Field(min_length=1)  #: one is drawn for each sample
    noise: Literal["t5", "bart"] = "t5"  #: lm: spans behind sentinels, or the whole text from a masked one
    rate: float | None = Field(default=None, gt=0, lt=1)  #: lm: share of the words; none: 0.15 (t5), 0.3 (bart)
    soft: bool = True  #: vqa: the loss is multiplied with the answer's soft score; gqa and visual7w have none
    ground: int = Field(default=1, ge=1, le=REGIONS)  #: refer, ground_caption: regions of a sample (VCR: 4)
    lower: bool = False  #: translate: lower case, as with T5
    languages: tuple[str, str] = ("English", "German")  #: translate: their names
    grid: tuple[int, int] | None = None  #: rows and columns of the cells that a model sees in the place of regions
    negatives: NegativesConfig = NegativesConfig()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.grid is not None and not 0 < self.grid[0] * self.grid[1] <= REGIONS:
            raise ValueError(f"grid: {self.grid[0]} x {self.grid[1]} cells, there are sentinels for 1 to {REGIONS}")
        return self


class Instruction(base.Instruction):
    """Draws one of the tasks and lays its prefix."""

    config: Config

    def __init__(self, config: Config, *, others: base.Others | None) -> None:
        super().__init__(config, others=others)
        self.wrong = Negatives(config.negatives, others, where="data.instruction.vlt5.negatives")
        if "itm" in config.tasks:
            self.wrong.check_captions()

    def symbols(self) -> tuple[str, ...]:
        tasks, marked = set(self.config.tasks), set()
        if self.config.ground > 1:
            marked = tasks & {"refer", "ground_caption"}
        spans = marked or ("lm" in tasks and self.config.noise == "t5")
        laid = {
            f"<extra_id_{REGIONS - 1}>": spans,
            f"<vis_extra_id_{REGIONS - 1}>": tasks & {"refer", "ground_caption", "refcocog"},
            "<mask>": "lm" in tasks and self.config.noise == "bart",
        }
        return tuple(name for name, by in laid.items() if by)

    def lay(self, example: Example, side: int) -> Example:
        task = draw_one(self.config.tasks, example.draw, "task")
        example = replace(example, weight=1.0)
        if task in ("vqa", "gqa", "visual7w"):
            return self._question(example, task)
        if task in ("refer", "ground_caption"):
            return self._grounded(example, task)
        if task in VCR:
            return self._vcr(example, task)
        if task == "caption":
            return replace(example, prefix=CAPTION, suffix=needed(example.suffix, task, "a caption"))
        if task == "nlvr":
            texts = example.meta.get("texts", [example.prefix])
            return replace(example, prefix=f"nlvr: {needed(texts[-1], task, 'a sentence')}")
        laid = {"lm": self._lm, "itm": self._itm, "refcocog": self._refcocog, "translate": self._translate}
        return laid[task](example)

    def _lm(self, example: Example) -> Example:
        words = needed(example.suffix, "lm", "a text").split()
        rng = generator(hash64(example.draw, "infill"))
        found = corrupt(words, NOISE[self.config.noise], rng, rate=self.config.rate)
        return replace(example, prefix=f"{LM[self.config.noise]} {found.holes}", suffix=found.said)

    def _itm(self, example: Example) -> Example:
        caption = needed(example.suffix, "itm", "a caption")
        right = draw_one((True, False), example.draw, "match")
        shown = caption if right else self.wrong.caption(example, caption)
        return replace(example, prefix=f"{ITM} {shown}", suffix="true" if right else "false")

    def _question(self, example: Example, task: str) -> Example:
        question = needed(example.prefix, task, "a question")
        scores = example.meta.get("answer_scores") or {}
        weight = scores.get(example.suffix, 1.0) if task == "vqa" and self.config.soft else 1.0
        return replace(example, prefix=f"{task}: {question}", weight=weight)

    def _grounded(self, example: Example, task: str) -> Example:
        objects = self._objects(example, task)
        rng = generator(hash64(example.draw, "regions"))
        drawn = np.argsort(rng.random(len(objects)), kind="stable")[: self.config.ground].tolist()
        several = self.config.ground > 1
        names, places = zip(*(objects[i] for i in drawn), strict=True)
        said = " ".join(f"{symbol(f'<extra_id_{n}>')} {name}" if several else name for n, name in enumerate(names))
        marks = " ".join(symbol(f"<vis_extra_id_{place}>") for place in places)
        if task == "refer":
            return replace(example, prefix=f"{REFER} {said}", suffix=marks)
        return replace(example, prefix=f"{GROUND_CAPTION} {marks}", suffix=said)

    def _objects(self, example: Example, task: str) -> list[tuple[str, int]]:
        """Return the name of each object that the model sees, and which region or cell it is."""
        names = needed(example.meta.get("names"), task, "names of objects")
        if self.config.grid is None:
            shown = len(needed(example.regions_K4, task, "regions (data.regions, or grid)"))
            return [(name, number) for number, name in enumerate(names[: min(shown, REGIONS)])]
        found = []
        for number, (name, box_4) in enumerate(zip(names, needed(example.boxes_K4, task, "boxes"))):
            chance_K = _near(covered(cells(self.config.grid), box_4))
            if chance_K[-1]:
                found.append((name, _drawn(chance_K, example.draw, f"cell of {number}")))
        return needed(found, task, "an object that covers half a cell of the grid")

    def _refcocog(self, example: Example) -> Example:
        truth_4 = needed(example.boxes_K4, "refcocog", "a box")[0]
        if self.config.grid is not None:
            like_K = covered(cells(self.config.grid), truth_4)
        else:
            seen_K4 = needed(example.regions_K4, "refcocog", "regions (data.regions, or grid)")
            like_K = overlap(seen_K4[:REGIONS], truth_4)
        chance_K = _near(like_K)
        prefix = f"{REFER} {needed(example.prefix or example.suffix, 'refcocog', 'a phrase')}"
        if not chance_K[-1]:  # nothing that the model sees is what is meant: shown, but not learned from
            return replace(example, prefix=prefix, suffix=symbol("<vis_extra_id_0>"), weight=0.0)
        index = _drawn(chance_K, example.draw, "region")
        return replace(example, prefix=prefix, suffix=symbol(f"<vis_extra_id_{index}>"))

    def _vcr(self, example: Example, task: str) -> Example:
        texts = example.meta.get("texts", [])
        if len(texts) != VCR[task].count("{}"):
            raise BadSample(f"{task} needs {VCR[task].count('{}')} texts, this data.reader gives {len(texts)}")
        if not example.images and example.regions_K4 is None:
            raise BadSample(f"{task} asks about a picture, and none is shown: set data.reader's image, or data.regions")
        return replace(example, prefix=VCR[task].format(*texts))

    def _translate(self, example: Example) -> Example:
        given, said = example.prefix, example.suffix
        if self.config.lower:
            given, said = given.lower(), said.lower()
        source, target = self.config.languages
        return replace(example, prefix=f"translate {source} to {target}: {given}", suffix=said)


def _near(like_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the chances of regions that are near enough, each in proportion to how near, summed up [K]."""
    found_K: NDArray[np.float64] = np.where(like_K >= NEAR, like_K, 0.0).cumsum()
    return found_K


def _drawn(chance_K: NDArray[np.float64], draw: int, salt: str) -> int:
    """Return a region, drawn by the chances that `_near` returns."""
    return int(np.searchsorted(chance_K, draw_share(draw, salt) * chance_K[-1], side="right"))


def overlap(boxes_K4: NDArray[np.float32], box_4: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return intersection over union [K] of boxes with one box."""
    shared_K = _shared(boxes_K4, box_4)
    sides_K2 = (boxes_K4[:, 2:] - boxes_K4[:, :2]).astype(np.float64)
    own = float(np.prod((box_4[2:] - box_4[:2]).astype(np.float64)))
    found_K: NDArray[np.float64] = shared_K / (sides_K2.prod(1) + own - shared_K)
    return found_K


def covered(boxes_K4: NDArray[np.float32], box_4: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the share [K] of each box that one box covers."""
    found_K: NDArray[np.float64] = _shared(boxes_K4, box_4) / (boxes_K4[:, 2:] - boxes_K4[:, :2]).astype(float).prod(1)
    return found_K


def _shared(boxes_K4: NDArray[np.float32], box_4: NDArray[np.float32]) -> NDArray[np.float64]:
    low_K2, high_K2 = np.maximum(boxes_K4[:, :2], box_4[:2]), np.minimum(boxes_K4[:, 2:], box_4[2:])
    area_K: NDArray[np.float64] = (high_K2 - low_K2).clip(min=0).astype(np.float64).prod(1)
    return area_K

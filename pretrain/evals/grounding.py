"""Visual grounding: the share of expressions whose box the model finds (Acc@0.5; Yu et al. 2016, arXiv:1608.00272).

A model whose vocabulary has bins writes a box as four of them (Wang et al. 2022, arXiv:2202.03052); one that has
sentinels of regions names one of a detector's (Cho et al. 2021, arXiv:2102.02779), or a cell of a grid. A cell is found
where the right box covers half of it: no cell overlaps a whole box by half, so these numbers are another score.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import bins, symbols
from pretrain.data.asked import BOX, GIVEN
from pretrain.data.boxes import cells
from pretrain.evals import base
from pretrain.metrics import grounding
from pretrain.metrics.interval import Score, mean
from pretrain.models.constraints import Exactly
from pretrain.models.writing import Options, refuse_rules

Box = list[float]


class Config(base.Config):
    """`evals.grounding`."""

    reader: dict[str, dict[str, Any]] = {"grounding": {}}  # noqa: RUF012
    write: Options = Options(beams=5)  #: how bins are written
    threshold: float = Field(default=0.5, gt=0, le=1)  #: intersection over union that is enough
    examples: int = Field(default=6, ge=0)  #: expressions that the report shows

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        refuse_rules(self.write)
        return self


class Eval(base.Eval):
    """Accuracy over all expressions."""

    config: Config
    needs = ("generate",)

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return Acc@THRESHOLD and mean_iou; of regions also any_word/Acc@THRESHOLD and oracle/Acc@THRESHOLD.

        A region is the likeliest of those that the row has, with any_word the likeliest of all words, which need not
        be a region. The oracle takes the best region. Of the cells of a grid it is cell@THRESHOLD and mean_covered.
        """
        self.examples = None
        words = features.composer.tokenizer
        finds = self._bins if words.symbol("<bin_0>") is not None else self._regions
        if words.symbol("<bin_0>") is None and words.symbol("<vis_extra_id_0>") is None:
            raise ConfigError("evals.grounding: the model's vocabulary has neither bins nor sentinels of regions")
        grid = self._grid()
        if finds == self._regions and grid is None and self.config.regions is None:
            raise ConfigError(
                "evals.grounding: the model names regions, and the data gives none; set evals.grounding.regions, or "
                "the instruction's grid where it sees cells"
            )
        measure = grounding.iou if grid is None else grounding.covered
        rows: list[tuple[Any, dict[str, float]]] = []
        for batch in self.batches(features, asked=True):
            if not all(meta[BOX] for meta in batch.meta):
                raise ConfigError(
                    f"evals.grounding.reader: {next(iter(self.config.reader))} gives no boxes; take grounding"
                )
            cards = []
            for name, found, meta in zip(base.names(batch), finds(features, batch), batch.meta):
                truth = meta[BOX]
                like = {kind: _of(measure, box, truth) for kind, box in found.items()}
                rows.append((name, like))
                card = {"given": symbols.plain(meta[GIVEN]), "boxes": [found[""]], "people_boxes": [truth]}
                cards.append({**card, "right": float(like[""] >= self.config.threshold)})
            self.show(batch, cards, count=self.config.examples)
        rows = base.everyone(rows)
        threshold = self.config.threshold
        share, middle = ("Acc", "mean_iou") if grid is None else ("cell", "mean_covered")
        scores = {
            f"{kind}{share}@{threshold:g}": grounding.accuracy([like[kind] for _, like in rows], threshold)
            for kind in rows[0][1]
        }
        return scores | {middle: mean([like[""] for _, like in rows], unit="points")}

    def _grid(self) -> tuple[int, int] | None:
        grid: tuple[int, int] | None = getattr(getattr(self.instruction(), "config", None), "grid", None)
        return grid

    def _bins(self, features: base.Features, batch: Batch) -> list[dict[str, Box]]:
        words, made = features.composer.tokenizer, self.instruction()
        section = getattr(getattr(made, "config", None), "boxes", bins.Config())
        first = words.symbol("<bin_0>")
        last = words.symbol(f"<bin_{section.bins - 1}>")
        if last is None or last - first != section.bins - 1:
            raise ConfigError(f"evals.grounding.instruction: the model's vocabulary has not {section.bins} bins")
        rule = Exactly(first, section.bins, tokens=4, end=words.end)
        written = [kept[0].tokens for kept in features.write(batch, self.config.write, constraint=rule)]
        boxes_B4 = bins.decode(np.array(written) - first, features.transform.size, section)
        return [{"": box} for box in boxes_B4.tolist()]

    def _regions(self, features: base.Features, batch: Batch) -> list[dict[str, Box]]:
        words, grid = features.composer.tokenizer, self._grid()
        measure = grounding.iou if grid is None else grounding.covered
        ids = []
        while (token := words.symbol(f"<vis_extra_id_{len(ids)}>")) is not None:
            ids.append(token)

        def first_word(model: Any, batch: Batch) -> Tensor:
            opening_BU = torch.tensor(model.first, device=batch.tokens_BT.device).expand(len(batch), -1)
            return model.write(opening_BU, model.remember(batch))[:, -1]

        with torch.no_grad():
            logits_BV = features.run(batch.to(features.device), first_word).float().cpu()
        out = []
        for row, logits_V in enumerate(logits_BV[: len(batch) - batch.filler]):
            boxes = cells(grid).tolist() if grid is not None else _of_row(batch, row)
            boxes = boxes[: len(ids)]
            best = boxes[int(logits_V[ids[: len(boxes)]].argmax())] if boxes else [0.0] * 4
            word = int(logits_V.argmax())
            free = boxes[ids.index(word)] if word in ids[: len(boxes)] else [0.0] * 4
            truth = batch.meta[row][BOX]
            oracle = max(boxes, key=lambda box: _of(measure, box, truth), default=[0.0] * 4)
            out.append({"": best, "any_word/": free, "oracle/": oracle})
        return out


def _of_row(batch: Batch, row: int) -> list[Box]:
    """Return the regions of a row."""
    assert batch.boxes_K4 is not None and batch.box_owner_K is not None
    return batch.boxes_K4[batch.box_owner_K == row].tolist()


def _of(measure: Callable[[Tensor, Tensor], Tensor], left: Box, right: Box) -> float:
    return measure(torch.tensor([left]), torch.tensor([right])).item()

"""Say which words are hidden, from the words around them and the picture (Devlin et al. 2018, BERT, arXiv:1810.04805).

With a picture: Li et al. 2021, ALBEF, arXiv:2107.07651, section 3.2. Text is read both ways.

    L = -(1 / hidden words of the step) sum over rows, hidden t of log p(y_t | the rest, picture)

Shapes: B = rows, T = tokens.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pretrain.batch import Batch
from pretrain.losses.targets import Hiding
from pretrain.losses.tokens import IGNORE, count_B, token_sum
from pretrain.models.fused_vlm import FusedEncodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.masked_lm`."""

    share: float = Field(default=0.15, gt=0, lt=1)  #: of a text's words that are hidden, drawn for each


class Objective(base.Objective):
    """Cross-entropy of hidden words; specials, padding and given text are never hidden."""

    needs = ("fuse", "cloze")
    config: Config

    def attach(self, model: Any) -> None:
        """Learn which ids are no words."""
        self.hiding = Hiding(self.config.share, *base.vocabulary_of(model))

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Hide words, as each sample's hash has it, and count them."""
        tokens_BT, labels_BT, draw_B = batch.tokens_BT, batch.labels_BT, batch.draw_B
        assert tokens_BT is not None and labels_BT is not None and draw_B is not None
        cloze = self.hiding(tokens_BT, self.hiding.words(tokens_BT) & (labels_BT != IGNORE), draw_B)
        return base.Prepared(cloze._asdict(), count_B(cloze.labels_BT).sum())

    def forward(self, encodings: FusedEncodings, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's share of the loss."""
        tokens_BT, labels_BT = prepared.draws["tokens_BT"], prepared.draws["labels_BT"]
        states_BTC = encodings.fuse(tokens_BT, torch.zeros_like(tokens_BT), valid_BT=encodings.batch.valid_BT)
        loss_B = token_sum(encodings.lm_logits(states_BTC), labels_BT, weight_B=encodings.batch.weight_B)
        return base.over(loss_B.sum(), prepared.count), {}

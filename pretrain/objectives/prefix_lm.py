"""Go on with a text whose first part, of random length, is read both ways (Wang et al. 2021, SimVLM, arXiv:2108.10904).

    L = -(1 / words of all suffixes) sum over rows, t >= P of log p(y_t | y_<t, picture),   P drawn for each row

P is drawn evenly from 1 token (the start) to all but the last; a row's given text always belongs to it.
Shapes: B = rows, T = tokens.
"""

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.draws import uniform
from pretrain.losses.targets import next_words
from pretrain.losses.tokens import IGNORE, count_B, token_sum
from pretrain.models.fused_vlm import FusedEncodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.prefix_lm`."""


class Objective(base.Objective):
    """Cross-entropy of the next word in the suffix."""

    needs = ("fuse", "cloze")
    config: Config

    def attach(self, model: object) -> None:
        """Refuse a model that is to write at mask tokens."""
        base.refuse_masked(model, "prefix_lm")

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Draw each row's prefix, as its hash has it, and count what follows."""
        labels_BT, valid_BT, draw_B = batch.labels_BT, batch.valid_BT, batch.draw_B
        assert labels_BT is not None and valid_BT is not None and draw_B is not None
        least_B = (valid_BT & (labels_BT == IGNORE)).sum(1).clamp(min=1)
        room_B = (valid_BT.sum(1) - least_B).clamp(min=1)
        prefix_B = least_B + (uniform(draw_B, 1, "prefix")[:, 0] * room_B).long()
        place_T = torch.arange(labels_BT.shape[1], device=labels_BT.device)
        blocks_BT = (place_T >= prefix_B[:, None]).long()
        # the last place of the prefix says the first word after it
        said_BT = torch.where(place_T >= prefix_B[:, None] - 1, next_words(labels_BT), IGNORE)
        return base.Prepared({"blocks_BT": blocks_BT, "labels_BT": said_BT}, count_B(said_BT).sum())

    def forward(self, encodings: FusedEncodings, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's share of the loss."""
        batch = encodings.batch
        assert batch.tokens_BT is not None
        states_BTC = encodings.fuse(batch.tokens_BT, prepared.draws["blocks_BT"], valid_BT=batch.valid_BT)
        loss_B = token_sum(encodings.lm_logits(states_BTC), prepared.draws["labels_BT"], weight_B=batch.weight_B)
        return base.over(loss_B.sum(), prepared.count), {}

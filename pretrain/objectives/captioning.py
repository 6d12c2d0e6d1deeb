"""Write the caption word by word, reading the picture (Yu et al. 2022, CoCa, arXiv:2205.01917, section 3.2).

    L = -(1 / tokens of the step) sum over rows, t of log p(y_t | y_<t, picture)

The picture is read whole, the text causally; a row's given text (its prompt) is read and not learned, both ways or
causally as the model reads it when it writes.
Shapes: B = rows, T = tokens.
"""

from typing import Any

from pydantic import Field
from torch import Tensor

from pretrain.batch import Batch
from pretrain.losses.targets import next_words, written_blocks
from pretrain.losses.tokens import count_B, token_sum
from pretrain.models.fused_vlm import FusedEncodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.captioning`; CoCa weighs it 2 beside `contrastive` with 1."""

    smoothing: float = Field(default=0.0, ge=0, lt=1)  #: of labels


class Objective(base.Objective):
    """Cross-entropy of the next word, over all words of the step."""

    needs = ("fuse",)
    config: Config

    def attach(self, model: Any) -> None:
        """Refuse a model that is to write at mask tokens; learn how it reads a prompt."""
        base.refuse_masked(model, "captioning")
        self.prompt_block = model.prompt_block

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Count the words to learn."""
        assert batch.labels_BT is not None
        return base.Prepared({}, count_B(next_words(batch.labels_BT)).sum())

    def forward(self, encodings: FusedEncodings, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's share of the loss."""
        batch = encodings.batch
        assert batch.tokens_BT is not None and batch.blocks_BT is not None and batch.labels_BT is not None
        blocks_BT = batch.blocks_BT  # causal throughout: CoCa's lower half is then computed once for both losses
        if self.prompt_block == 0:
            assert batch.valid_BT is not None
            blocks_BT = written_blocks(batch.labels_BT, batch.valid_BT, self.prompt_block)
        states_BTC = encodings.fuse(batch.tokens_BT, blocks_BT, valid_BT=batch.valid_BT)
        logits_BTV = encodings.lm_logits(states_BTC)
        said_BT = next_words(batch.labels_BT)
        loss_B = token_sum(logits_BTV, said_BT, weight_B=batch.weight_B, smoothing=self.config.smoothing)
        return base.over(loss_B.sum(), prepared.count), {}

"""Write what an instruction asks for: cross-entropy of an encoder-decoder's tokens, whatever the task.

Image captioning, matching, questions, boxes, image codes and text infilling are the same loss on other texts, so there
is one objective for all of them; denoising is an instruction like any other (or the reader `infill`).

Two reductions are published:
- `token`: the sum over all tokens of a mini-batch, of all ranks, weighed by the sample's confidence, divided by the
  number of its tokens; the means of a step's mini-batches are added (Wang et al. 2022, arXiv:2202.03052)
- `sample`: the mean over samples of weight x mean over the sample's tokens, so that a short answer counts as much as a
  long one (Cho et al. 2021, arXiv:2102.02779)

OFA adds to the loss of a token, where asked to, R-Drop (a second pass under dropout, losses/rdrop.py; the sum over both
passes is divided by twice the tokens) and the encouraging loss (losses/encouraging.py).

Shapes: B = rows, U = places of the decoder, V = vocabulary.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.batch import Batch
from pretrain.losses.encouraging import bonus
from pretrain.losses.rdrop import symmetric_kl
from pretrain.losses.tokens import IGNORE, count_B, sample_mean, token_losses
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.instruction`."""

    reduction: Literal["token", "sample"] = "token"
    smoothing: float = Field(default=0.0, ge=0, lt=1)  #: label smoothing, over the tokens that are allowed
    drop_worst: float = Field(
        default=0.0, ge=0, lt=1
    )  #: share of a rank's tokens, those of the greatest loss, left out
    drop_worst_after: int = Field(default=0, ge=0)  #: steps before that
    rdrop: float = Field(default=0.0, ge=0)  #: weight of R-Drop, at the price of a second pass; OFA: 1
    #: encouraging loss: the probability above which its bonus goes on as a straight line; none: no bonus
    encouraging: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.drop_worst and self.reduction == "sample":
            raise ValueError("drop_worst leaves out tokens of the whole batch; it goes with reduction: token")
        return self


class Objective(base.Objective):
    """Token cross-entropy of batch.decoder_labels_BU."""

    needs = ("seq2seq",)
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.whole = config.drop_worst > 0  # the worst of a micro-batch are others than those of the batch

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Return how many tokens of the batch are kept where some are not, and what counts: tokens, or rows."""
        labels_BU = batch.decoder_labels_BU
        assert labels_BU is not None, "the batch says nothing: its composer is one of causal towers"
        if self.config.reduction == "sample":
            return super().prepare(batch, step)
        count = count_B(labels_BU).sum()
        if not self.config.drop_worst or step < self.config.drop_worst_after:
            return base.Prepared({}, count.float())
        kept = (count * (1 - self.config.drop_worst)).long()
        return base.Prepared({"kept": kept}, kept.float())

    def forward(self, encodings: Any, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; nothing else is logged."""
        batch: Batch = encodings.batch
        labels_BU = batch.decoder_labels_BU
        assert labels_BU is not None and prepared.count is not None
        allowed_BUV = None if batch.allowed_BU is None else allowed(encodings.logits_BUV, batch)
        losses_BU = self._of_pass(encodings.logits_BUV, labels_BU, allowed_BUV)
        if self.config.rdrop:
            again_BUV = encodings.model(batch).logits_BUV  # inside the one forward: ZeRO-3 gathers again
            apart_BU = symmetric_kl(encodings.logits_BUV, again_BUV, labels_BU, allowed_BTV=allowed_BUV)
            losses_BU = losses_BU + self._of_pass(again_BUV, labels_BU, allowed_BUV) + self.config.rdrop * apart_BU
            losses_BU = losses_BU / 2
        if batch.weight_B is not None:
            losses_BU = losses_BU * batch.weight_B[:, None]
        if self.config.reduction == "sample":
            total = sample_mean(losses_BU, labels_BU).sum()
        elif "kept" in prepared.draws:
            kept = int(prepared.draws["kept"])
            total = losses_BU[labels_BU != IGNORE].topk(kept, largest=False, sorted=False).values.sum()
        else:
            total = losses_BU.sum()
        return total / torch.where(prepared.count > 0, prepared.count, 1.0), {}

    def _of_pass(self, logits_BUV: Tensor, labels_BU: Tensor, allowed_BUV: Tensor | None) -> Tensor:
        """Return each token's loss [B, U]."""
        smoothing, end = self.config.smoothing, self.config.encouraging
        losses_BU = token_losses(logits_BUV, labels_BU, smoothing=smoothing, allowed_BTV=allowed_BUV)
        if end is None:
            return losses_BU
        nll_BU = token_losses(logits_BUV, labels_BU, allowed_BTV=allowed_BUV) if smoothing else losses_BU
        return (losses_BU + bonus(nll_BU, end)).masked_fill(labels_BU == IGNORE, 0.0)


def allowed(logits_BUV: Tensor, batch: Batch) -> Tensor:
    """Return bool [B, U, V]: what may stand at each place; a model's unused rows of the table may stand nowhere."""
    assert batch.allowed_BU is not None and batch.allowed_SV is not None
    sets_SV = batch.allowed_SV
    spare = logits_BUV.shape[-1] - sets_SV.shape[1]
    if spare > 0:
        sets_SV = torch.cat([sets_SV, sets_SV[:, :1].new_zeros(len(sets_SV), spare)], 1)
        sets_SV[0] = True
    return sets_SV[batch.allowed_BU]

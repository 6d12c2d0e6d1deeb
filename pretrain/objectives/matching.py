"""Whether picture and text belong together: pairs, and mismatches that look alike (Li et al. 2021, arXiv:2107.07651).

Each row comes three times: with its own picture, with one that its text nearly fits, and its picture with a text that
it nearly fits. Those are drawn from softmax(similarity) over rows of other captions, ALBEF's hard negatives, with 1e-4
more for each, as BLIP has it (arXiv:2201.12086): a caption that occurs twice is never a mismatch of its twin, and a row
among equal captions has none.

    L = (1 / pairs of the step) sum over pairs of cross-entropy(matches or not),  text read both ways, first state

Mismatches come from this rank's rows: pictures are not sent around (a rank reads its own lanes: of data in one shard
always the same samples, with `data.lanes` above 1). With `among`, from the row's group of so many rows
that stand one after the other in the batch; if it divides the rows of a micro-batch, the loss is the same however many
ranks and micro-batches there are. Without, from all rows of the rank, which then cannot be cut into micro-batches.

Shapes: B = rows, T = tokens, P = pairs = 3 B.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.draws import scores, uniform
from pretrain.models.fused_vlm import FusedEncodings
from pretrain.objectives import base

FLOOR = 1e-4  #: beside each row's share of the softmax


class Config(base.Config):
    """`objectives.matching`."""

    among: int | None = Field(default=None, gt=1)  #: rows that mismatches are drawn from; None: those of the rank


class Objective(base.Objective):
    """Two classes, one pair and two hard negatives a row."""

    needs = ("image", "text", "fuse", "match")
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.whole = config.among is None

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Find the rows that may be mismatched, and count pairs."""
        rows, group = len(batch), self.config.among or len(batch)
        assert batch.draw_B is not None
        if rows % group:
            raise ConfigError(
                f"objectives.matching.among: groups of {group} do not fit into the {rows} rows that go through the "
                "model at once (train.micro_batch_size, or the rows of a rank); take a divisor"
            )
        row_B = torch.arange(rows, device=batch.draw_B.device)
        apart_BB = (row_B[:, None] != row_B) & (row_B[:, None] // group == row_B // group)
        if batch.caption_B is not None:
            apart_BB &= batch.caption_B[:, None] != batch.caption_B
        return base.Prepared({"apart_BB": apart_BB}, rows + 2 * apart_BB.any(1).sum())

    def forward(self, encodings: FusedEncodings, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's share of the loss, and the share of pairs that are told right."""
        batch, apart_BB = encodings.batch, prepared.draws["apart_BB"]
        assert batch.tokens_BT is not None
        encodings.refuse_unpaired()
        row_B = torch.arange(len(batch), device=apart_BB.device)
        image_B, text_B = self.negatives(encodings, apart_BB)
        states_PTC = encodings.fuse(
            batch.tokens_BT,
            torch.zeros_like(batch.tokens_BT),
            encodings.own_B[torch.cat([row_B, image_B, row_B])],
            batch.valid_BT,
            text_B=torch.cat([row_B, row_B, text_B]),
        )
        logits_P2 = encodings.match_logits(states_PTC)
        own_P = torch.arange(len(logits_P2), device=row_B.device) < len(row_B)
        counts_P = own_P | apart_BB.any(1).repeat(3)
        losses_P = F.cross_entropy(logits_P2.to(_at_least_single(logits_P2)), own_P.long(), reduction="none")
        right_P = (logits_P2.argmax(1) == own_P) & counts_P
        accuracy = base.over(right_P.sum().double(), prepared.count) / prepared.part
        return base.over((losses_P * counts_P).sum(), prepared.count), {"accuracy": accuracy}

    @torch.no_grad()
    def negatives(self, encodings: FusedEncodings, apart_BB: Tensor) -> tuple[Tensor, Tensor]:
        """Return a picture for each row's text, and a text for each row's picture, as rows [B]."""
        draw_B = encodings.batch.draw_B
        assert draw_B is not None
        logits_BB = encodings.scale * encodings.text @ encodings.image.T  # a text's pictures in a row
        found = []
        for purpose, logits in (("mismatched picture", logits_BB), ("mismatched text", logits_BB.T)):
            among = logits.masked_fill(~apart_BB, -torch.inf)
            weight_BB = torch.nan_to_num(among.softmax(1)) + FLOOR  # rows without any are all not-a-number
            # the largest of log weight + Gumbel noise is a draw; the noise is a hash of the two samples
            pair_BB = scores(draw_B, 1) ^ draw_B
            noise_BB = uniform(pair_BB.flatten(), 1, purpose).view(pair_BB.shape).clamp(min=1e-12)
            drawn_BB = weight_BB.double().log() - (-noise_BB.log()).log()
            found.append(drawn_BB.masked_fill(~apart_BB, -torch.inf).argmax(1))
        return found[0], found[1]


def _at_least_single(x: Tensor) -> torch.dtype:
    return x.dtype if x.element_size() >= 4 else torch.float32

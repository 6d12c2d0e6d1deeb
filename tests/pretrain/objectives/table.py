"""A model of one table that provides seq2seq, and batches that write texts of given lengths."""

import torch
from torch import nn

from pretrain import dist
from pretrain.batch import Batch
from pretrain.models import base as models

V, C, IGNORE = 13, 4, -100


class Table(models.Model):
    """Scores words by the last word written and the mean of what is read."""

    provides = ("seq2seq",)

    def __init__(self) -> None:
        super().__init__()
        dist.seed_step(0, "table")
        self.words = nn.Parameter(torch.randn(V, C, dtype=torch.float64))

    def forward(self, batch: Batch) -> "Table.Encodings":
        return Table.Encodings(self, batch)

    class Encodings:
        """Logits of a batch."""

        def __init__(self, model: "Table", batch: Batch) -> None:
            self.model, self.batch = model, batch
            read_BC = (model.words[batch.tokens_BT] * batch.valid_BT[..., None]).sum(1)
            states_BUC = model.words[batch.decoder_tokens_BU] + read_BC[:, None] / 3
            self.logits_BUV = states_BUC @ model.words.T


def batch(lengths: list[int], *, seed: int = 0, part: int = 0) -> Batch:
    """Return rows that write so many tokens each, padded to the longest."""
    draw = torch.Generator().manual_seed(seed)
    rows, places = len(lengths), max(lengths)
    said_BU = torch.randint(1, V, (rows, places), generator=draw)
    counts_BU = torch.arange(places) < torch.tensor(lengths)[:, None]
    return Batch(
        keys=[f"{seed}-{n}" for n in range(rows)],
        tokens_BT=torch.randint(1, V, (rows, 3), generator=draw),
        valid_BT=torch.ones(rows, 3, dtype=torch.bool),
        decoder_tokens_BU=torch.randint(1, V, (rows, places), generator=draw),
        decoder_labels_BU=said_BU.masked_fill(~counts_BU, IGNORE),
        weight_B=torch.rand(rows, generator=draw, dtype=torch.float64),
        part=part,
    )

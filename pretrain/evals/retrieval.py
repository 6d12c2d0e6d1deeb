"""Retrieval: find a picture's caption among all captions, and the other way round (R@1, R@5, R@10).

A query counts as found when any of its right items is in the first K: captions that are equal are all
right (Karpathy & Fei-Fei 2015, arXiv:1412.2306, for the protocol; ties count against us).
Shapes: N = pairs of one rank, M = pairs of all ranks, E = embedding width.
"""

import torch
from pydantic import Field
from torch import Tensor

from pretrain import dist
from pretrain.evals import base
from pretrain.metrics.interval import Score, proportion
from pretrain.metrics.ranking import ranks


class Config(base.Config):
    """`evals.retrieval`."""

    k: list[int] = Field(default_factory=lambda: [1, 5, 10])


class Eval(base.Eval):
    """Recall at K in both directions, the gallery gathered from all ranks, the queries left where they are."""

    config: Config

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return image_to_text/R@K and text_to_image/R@K."""
        image, text, same = [], [], []
        for batch in self.batches(features):
            assert batch.caption_B is not None
            image.append(features.of(batch, "image").cpu())
            text.append(features.of(batch, "text").cpu())
            same.append(batch.caption_B[: len(batch) - batch.filler].cpu())
        image_NE, text_NE, same_N = torch.cat(image), torch.cat(text), torch.cat(same)
        same_M = _everyone(same_N)
        scores = {}
        for name, query_NE, gallery_ME in (
            ("image_to_text", image_NE, _everyone(text_NE)),
            ("text_to_image", text_NE, _everyone(image_NE)),
        ):
            rank_N = ranks(query_NE, gallery_ME, same_N, same_M)
            scores |= {f"{name}/R@{k}": _recall(rank_N, k) for k in self.config.k}
        return scores


def _everyone(rows: Tensor) -> Tensor:
    """Return the rows of all ranks; ranks may hold different numbers of rows."""
    return torch.cat([torch.as_tensor(part) for part in dist.gather_objects(rows)])


def _recall(rank_N: Tensor, k: int) -> Score:
    parts = dist.gather_objects([int((rank_N < k).sum()), len(rank_N)])
    return proportion(sum(p[0] for p in parts), sum(p[1] for p in parts))

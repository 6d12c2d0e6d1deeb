"""Retrieval: find a picture's caption among all captions, and the other way round (R@1, R@5, R@10).

A query counts as found when any of its right items is in the first K: captions that are equal are all
right (Karpathy & Fei-Fei 2015, arXiv:1412.2306, for the protocol; ties count against us).
For the report, the first pictures and captions are kept small with what is found for them.
Shapes: N = pairs of one rank, M = pairs of all ranks, E = embedding width, S = pairs that are kept small.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pretrain import dist
from pretrain.batch import Batch
from pretrain.data.compose import Composer
from pretrain.data.thumbnail import small, webp
from pretrain.evals import base
from pretrain.metrics.interval import Score, proportion
from pretrain.metrics.ranking import ranks


class Config(base.Config):
    """`evals.retrieval`."""

    k: list[int] = Field(default_factory=lambda: [1, 5, 10])
    examples: int = Field(default=6, ge=0)  #: queries of each direction that the report shows


SIDE = 64  # pixels of a picture that is kept
KEPT = 2048  # pictures that rank 0 keeps: the gallery of the examples, 25 MB
FOUND = 5  # answers shown


class Examples:
    """The first pairs of rank 0: small pictures and captions, from which the report's examples are drawn."""

    def __init__(self) -> None:
        self.pictures: list[Tensor] = []
        self.captions: list[str] = []

    def add(self, batch: Batch, composer: Composer) -> None:
        """Keep a batch's own rows, unless there are enough."""
        room = min(len(batch) - batch.filler, KEPT - len(self.captions))
        if room <= 0 or batch.image_NCHW is None or batch.tokens_BT is None or batch.valid_BT is None:
            return
        self.pictures += small(batch.image_NCHW[:room], SIDE).unbind(0)
        for ids_T, valid_T in zip(batch.tokens_BT[:room], batch.valid_BT[:room]):
            self.captions.append(composer.tokenizer.decode(ids_T[valid_T].tolist()))

    def tree(self, image_SE: Tensor, text_SE: Tensor, same_S: Tensor, *, count: int) -> dict[str, Any]:
        """Return for `count` captions the pictures that fit best and for as many pictures the captions."""
        kept = len(self.captions)
        score_SS = image_SE[:kept] @ text_SE[:kept].T  # picture by caption
        count = min(count, kept)
        chosen = [kept * n // count for n in range(count)]
        out: dict[str, Any] = {"text_to_image": [], "image_to_text": []}
        for query in chosen:
            best = score_SS[:, query].topk(min(FOUND, kept)).indices.tolist()
            found = [{"image": webp(self.pictures[i]), "right": bool(same_S[i] == same_S[query])} for i in best]
            out["text_to_image"].append({"caption": self.captions[query], "found": found})
            best = score_SS[query].topk(min(FOUND, kept)).indices.tolist()
            words = [{"caption": self.captions[i], "right": bool(same_S[i] == same_S[query])} for i in best]
            own = {"caption": self.captions[query], "image": webp(self.pictures[query])}
            out["image_to_text"].append({**own, "found": words})
        return out


class Eval(base.Eval):
    """Recall at K in both directions, the gallery gathered from all ranks, the queries left where they are."""

    config: Config
    needs = ("image", "text")

    def run(self, features: base.Features) -> dict[str, Score]:
        """Return image_to_text/R@K and text_to_image/R@K."""
        image, text, same, examples = [], [], [], Examples()
        for batch in self.batches(features):
            assert batch.caption_B is not None
            if dist.is_main() and self.config.examples:
                examples.add(batch, features.composer)
            image.append(features.of(batch, "image").cpu())
            text.append(features.of(batch, "text").cpu())
            same.append(batch.caption_B[: len(batch) - batch.filler].cpu())
        image_NE, text_NE, same_N = torch.cat(image), torch.cat(text), torch.cat(same)
        if examples.captions:
            self.examples = examples.tree(image_NE, text_NE, same_N, count=self.config.examples)
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

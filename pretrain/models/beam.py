"""Beam search: the likeliest texts that start from the likeliest beginnings.

The rules are those of transformers: of twice as many continuations as there are beams, those that end compete for the
finished texts if they are among the first half, the best others go on; a row stops when no beginning can still beat
its worst finished text, or at its length. With as many beams as there are texts it finds the best of all.

Shapes: B = rows of a batch, K = beams, R = B * K, U = tokens, V = vocabulary, L = most tokens of a row.
"""

import torch
from torch import Tensor

from pretrain import dist
from pretrain.models.writing import Hypothesis, Pen, until


class Finished:
    """The best finished texts of each row, the best first."""

    def __init__(self, rows: int, beams: int, limit: int, *, end: int, device: torch.device) -> None:
        self.score_BK = torch.full((rows, beams), -torch.inf, device=device)
        self.tokens_BKL = torch.full((rows, beams, limit), end, device=device)

    def add(self, score_BK: Tensor, tokens_BKU: Tensor) -> None:
        """Compare with texts that end now; those with score -inf do not."""
        beams = self.score_BK.shape[1]
        room = self.tokens_BKL.shape[2]
        padded_BKL = self.tokens_BKL.new_zeros(*tokens_BKU.shape[:2], room)
        padded_BKL[..., : tokens_BKU.shape[2]] = tokens_BKU
        self.score_BK, index_BK = torch.cat([self.score_BK, score_BK], 1).topk(beams, dim=1)
        both = torch.cat([self.tokens_BKL, padded_BKL], 1)
        self.tokens_BKL = both.gather(1, index_BK[..., None].expand(-1, -1, room))


def beam(pen: Pen) -> list[list[Hypothesis]]:
    """Return each row's best texts, `options.keep` at most: fewer where a constraint leaves no more."""
    options, end = pen.options, pen.end
    beams = options.beams
    rows = len(pen.tokens_RU) // beams
    given_B1, most_B1 = (of_R.view(rows, beams)[:, :1] for of_R in (pen.given_R, pen.most_R))
    finished = Finished(rows, beams, pen.limit, end=end, device=pen.device)
    score_BK = torch.full((rows, beams), -torch.inf, device=pen.device)
    score_BK[:, 0] = 0.0  # all beams say the same as yet: one counts
    open_B = torch.ones(rows, dtype=torch.bool, device=pen.device)
    first_row_B1 = torch.arange(rows, device=pen.device)[:, None] * beams  # a row owns `beams` rows, end to end
    while dist.any_rank(more := bool(open_B.any()), device=pen.device):
        if not more:
            pen.idle()
            continue
        total_BKV = score_BK[..., None] + pen.log_probs().view(rows, beams, -1)
        vocabulary = total_BKV.shape[2]
        total_BW, index_BW = total_BKV.flatten(1).topk(min(2 * beams, beams * vocabulary), dim=1)  # W: twice the beams
        parent_BW, token_BW = index_BW // vocabulary, index_BW % vocabulary
        written_B1 = pen.tokens_RU.shape[1] + 1 - given_B1
        over_B1 = written_B1 >= most_B1
        ends_BW = (token_BW == end) & (written_B1 > 0) | over_B1
        # what ends
        scale_B1 = written_B1.clamp(min=1) ** options.length_penalty
        ending_BK = (ends_BW & open_B[:, None])[:, :beams]
        texts_BKU = torch.cat([pen.tokens_RU[first_row_B1 + parent_BW[:, :beams]], token_BW[:, :beams, None]], 2)
        finished.add((total_BW[:, :beams] / scale_B1).masked_fill(~ending_BK, -torch.inf), texts_BKU)
        # what goes on
        score_BK, place_BK = total_BW.masked_fill(ends_BW, -torch.inf).topk(beams, dim=1)
        pen.select((first_row_B1 + parent_BW.gather(1, place_BK)).flatten())
        pen.append(token_BW.gather(1, place_BK).flatten())
        best_B = (score_BK / scale_B1)[:, 0]
        worst_B = finished.score_BK[:, -1]
        open_B = open_B & best_B.isfinite() & (worst_B.isinf() | (best_B > worst_B))
    return _texts(pen, finished)


def _texts(pen: Pen, finished: Finished) -> list[list[Hypothesis]]:
    first, last = (of_R[:: pen.options.beams].tolist() for of_R in (pen.given_R, pen.given_R + pen.most_R))
    out = []
    for begin, stop, scores, texts in zip(first, last, finished.score_BK.tolist(), finished.tokens_BKL.tolist()):
        kept = [(score, text[begin:stop]) for score, text in zip(scores, texts) if score > -torch.inf]
        out.append([Hypothesis(until(text, pen.end), score) for score, text in kept[: pen.options.keep]])
    return out

"""Retrieval: at which rank the right answer comes.

Shapes: Q = queries, G = gallery items, P = right pairs of both, E = embedding width.
"""

import torch
from torch import Tensor


def ranks(query_QE: Tensor, gallery_GE: Tensor, right_Q: Tensor, owner_G: Tensor, *, chunk: int = 1024) -> Tensor:
    """Return for each query the rank (0 = first) of its best right item, int64 [Q].

    Item g is right for query q where owner_G[g] == right_Q[q]; a tie counts against us: an equal
    score of a wrong item comes first, so that constant features score 0, not 1.
    """
    out = []
    for query_cE, right_c in zip(query_QE.split(chunk), right_Q.split(chunk)):
        score_cG = query_cE @ gallery_GE.T
        right_cG = right_c[:, None] == owner_G
        best_c1 = score_cG.masked_fill(~right_cG, float("-inf")).amax(1, keepdim=True)
        out.append(((score_cG >= best_c1) & ~right_cG).sum(1))
    return torch.cat(out)


def ranks_of_pairs(query_QE: Tensor, gallery_GE: Tensor, right_P2: Tensor, *, chunk: int = 1024) -> Tensor:
    """Return for each query the rank (0 = first) of its best right item, int64 [Q]; ties as in `ranks`.

    `right_P2` lists (query, item) of what is right, in any order: a query has one right item at least.
    """
    query_P, item_P = right_P2.T
    out = []
    for start in range(0, len(query_QE), chunk):
        score_cG = query_QE[start : start + chunk] @ gallery_GE.T
        own_p = (query_P >= start) & (query_P < start + len(score_cG))
        right_cG = torch.zeros_like(score_cG, dtype=torch.bool)
        right_cG[query_P[own_p] - start, item_P[own_p]] = True
        best_c1 = score_cG.masked_fill(~right_cG, float("-inf")).amax(1, keepdim=True)
        out.append(((score_cG >= best_c1) & ~right_cG).sum(1))
    return torch.cat(out)

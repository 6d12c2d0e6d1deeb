"""Retrieval: at which rank the right answer comes.

Shapes: Q = queries, G = gallery items, E = embedding width.
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

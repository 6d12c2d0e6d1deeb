"""Writing text: what a model that writes says of a batch, token by token (greedy or drawn here, beams in beam.py).

All ranks write together and call the model equally often, as ZeRO-3 requires: a rank that is done goes on calling it
until all are. Call it inside the forward that DeepSpeed wraps (`Mixture.forward(want=...)`, `Features.write`).
Shapes: B = rows of a batch, R = rows that are written, T = tokens, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain import dist
from pretrain.batch import Batch
from pretrain.models.base import Writer
from pretrain.models.beam import beam
from pretrain.models.constraints import Constraint
from pretrain.models.writing import Hypothesis, Options, Pen, until


@torch.no_grad()
def generate(
    model: Writer,
    batch: Batch,
    options: Options,
    *,
    constraint: Constraint | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    room: Sequence[int] | None = None,
    cached: bool = True,
) -> list[list[Hypothesis]]:
    """Return for each row the texts that are kept, the best first; samples in the order in which they are drawn.

    Args:
        model: encodes the batch once.
        batch: what is given. Samples are a function of (options.seed, batch.draw_B), whatever else the batch holds.
        options: how; `max_tokens` counts for free text, a constraint knows its own length.
        constraint: what may be written.
        prompts: tokens of each row that the decoder reads before it writes.
        room: tokens that the model has places for in each row; None: as many as are asked for.
        cached: False: everything is computed again at each step, to test that nothing else comes out.
    """
    memory = model.remember(batch)
    copies = options.keep if options.sample else options.beams
    pen = Pen(model, memory, options, constraint=constraint, prompts=prompts, room=room, copies=copies, cached=cached)
    if options.beams > 1:
        return beam(pen)
    uniform_RT = _uniform(batch, options, pen.longest).to(pen.device) if options.sample else None
    found = _walk(pen, uniform_RT)
    return [found[start : start + copies] for start in range(0, len(found), copies)]


def _walk(pen: Pen, uniform_RT: Tensor | None) -> list[Hypothesis]:
    """Write each row on its own: the likeliest token at each step, or the one that `uniform_RT` draws."""
    score_R = torch.zeros(len(pen.tokens_RU), device=pen.device)
    open_R = torch.ones_like(score_R, dtype=torch.bool)
    while dist.any_rank(more := bool(open_R.any()), device=pen.device):
        if not more:
            pen.idle()
            continue
        log_RV = pen.log_probs()
        if uniform_RT is None:
            token_R = log_RV.argmax(1)
        else:
            place_R1 = pen.written_R.clamp(0, uniform_RT.shape[1] - 1)[:, None]
            token_R = drawn(log_RV, uniform_RT.gather(1, place_R1)[:, 0], pen.options)
        token_R = torch.where(open_R, token_R, pen.end)
        score_R += torch.where(open_R, log_RV.gather(1, token_R[:, None])[:, 0], 0.0)
        pen.append(token_R)
        written_R = pen.written_R
        open_R &= ((token_R != pen.end) | (written_R < 1)) & (written_R < pen.most_R)
    rows = zip(pen.tokens_RU.tolist(), pen.given_R.tolist(), pen.most_R.tolist(), score_R.tolist())
    return [Hypothesis(until(row[given : given + most], pen.end), score) for row, given, most, score in rows]


def drawn(log_RV: Tensor, uniform_R: Tensor, options: Options) -> Tensor:
    """Return one token a row, int64 [R]: where `uniform_R` falls in the distribution that the options leave.

    Temperature first, then the `top_k` likeliest, then the fewest that hold `top_p` of what is left (nucleus sampling,
    Holtzman et al. 2020, arXiv:1904.09751).
    """
    log_RV, token_RV = (log_RV / options.temperature).sort(dim=1, descending=True, stable=True)
    if options.top_k is not None:
        log_RV = log_RV[:, : options.top_k]
    probability_RV = log_RV.softmax(1)
    if options.top_p is not None:
        before_RV = probability_RV.cumsum(1) - probability_RV
        probability_RV = probability_RV.masked_fill(before_RV >= options.top_p, 0.0)
    edge_RV = probability_RV.cumsum(1)
    place_R1 = torch.searchsorted(edge_RV, uniform_R[:, None] * edge_RV[:, -1:], right=True)
    likely_R1 = (probability_RV > 0).sum(1, keepdim=True) - 1  # rounding may put the draw behind the last
    return token_RV.gather(1, torch.minimum(place_R1, likely_R1))[:, 0]


def _uniform(batch: Batch, options: Options, length: int) -> Tensor:
    """Return numbers in [0, 1) for each token of each sample: a function of (seed, the row's draw, the sample)."""
    assert batch.draw_B is not None, "sampling needs batch.draw_B"
    rows = []
    for draw in batch.draw_B.tolist():
        for copy in range(options.keep):
            source = torch.Generator().manual_seed(dist.hash64("write", options.seed, draw, copy))
            rows.append(torch.rand(length, generator=source))
    return torch.stack(rows)

"""How likely given texts are: the log-probability of one a row, or of every candidate for every row.

Wang et al. 2022 (OFA, arXiv:2202.03052) score all answers under a softmax over what the trie of answers allows, the
memory encoded once, the decoder in chunks. Li et al. 2021 (ALBEF, arXiv:2107.07651) take the whole softmax, of the 128
answers whose first token is likeliest.

Shapes: B = rows of a batch, A = candidates, R = rows that are scored (row, candidate), L = tokens of a text with its
end, U = tokens that the decoder reads, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.base import Memory, Writer
from pretrain.models.constraints import Constraint

IGNORE = -1


@torch.no_grad()
def log_likelihood(
    model: Writer,
    memory: Memory,
    texts: Sequence[Sequence[int]],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    constraint: Constraint | None = None,
) -> Tensor:
    """Return the log-probability of one text a row with its end token, float32 [R]; one call of the decoder.

    Args:
        model: writes.
        memory: what it reads, of R rows.
        texts: tokens of each row, without the end token.
        prompts: tokens of each row that the decoder reads first.
        constraint: probabilities are those of a softmax over what it allows, which must include the texts.

    Raises:
        ConfigError: the model has no places for a text behind what its row is given.
    """
    given = [[*model.first, *prompt] for prompt in (prompts or [[]] * len(texts))]
    said = [[*text, model.end] for text in texts]
    device = memory.states_BSC.device
    model.refuse_longer(memory, torch.tensor([len(one) for one in said], device=device))
    rows = [[*before, *text[:-1]] for before, text in zip(given, said, strict=True)]
    read_RU = _pad(rows, model.end).to(device)  # a decoder never looks to the right: padding there is exact
    said_RL = _pad(said, IGNORE).to(device)
    first_R1 = torch.tensor([[len(before) - 1] for before in given], device=device)
    logits_RUV = model.write(read_RU, memory)
    place_RL = (first_R1 + torch.arange(said_RL.shape[1], device=device)).clamp(max=read_RU.shape[1] - 1)
    logits_RLV = logits_RUV.gather(1, place_RL[..., None].expand(-1, -1, logits_RUV.shape[2])).float()
    if constraint is not None:
        logits_RLV = logits_RLV.masked_fill(~_allowed(constraint, said_RL, logits_RLV.shape[2]), -torch.inf)
    score_RL = logits_RLV.gather(2, said_RL.clamp(min=0)[..., None])[..., 0] - logits_RLV.logsumexp(2)
    return torch.where(said_RL == IGNORE, 0.0, score_RL).sum(1)


@torch.no_grad()
def rank(
    model: Writer,
    memory: Memory,
    candidates: Sequence[Sequence[int]],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    constraint: Constraint | None = None,
    chunk: int = 20,
    likeliest: int | None = None,
) -> Tensor:
    """Return the log-probability of every candidate for every row, float32 [B, A]; -inf where it was not looked at.

    Args:
        model: writes.
        memory: what it reads, encoded once.
        candidates: tokens of each text, without the end token.
        prompts: tokens of each row that the decoder reads first.
        constraint: as in `log_likelihood`.
        chunk: candidates of a row that are scored together.
        likeliest: score only so many candidates a row, those whose first token is likeliest.
    """
    rows, device = len(memory.states_BSC), memory.states_BSC.device
    given = list(prompts or [[]] * rows)
    if likeliest is not None and likeliest < len(candidates):
        chosen_BA = _likeliest(model, memory, candidates, given, likeliest)
    else:
        chosen_BA = torch.arange(len(candidates), device=device).expand(rows, -1)
    parts = []
    for index_BA in chosen_BA.split(chunk, dim=1):
        width = index_BA.shape[1]
        repeated = memory.rows(torch.arange(rows, device=device).repeat_interleave(width))
        texts = [candidates[index] for index in index_BA.flatten().tolist()]
        before = [prompt for prompt in given for _ in range(width)]
        found_R = log_likelihood(model, repeated, texts, prompts=before, constraint=constraint)
        parts.append(found_R.view(rows, width))
    out_BA = torch.full((rows, len(candidates)), -torch.inf, device=device)
    return out_BA.scatter_(1, chosen_BA, torch.cat(parts, 1))


def _likeliest(
    model: Writer, memory: Memory, candidates: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], count: int
) -> Tensor:
    """Return the candidates whose first token is likeliest, int64 [B, count]."""
    given = [[*model.first, *prompt] for prompt in prompts]
    read_BU = _pad(given, model.end).to(memory.states_BSC.device)
    last_B = torch.tensor([len(before) - 1 for before in given], device=read_BU.device)
    logits_BV = model.write(read_BU, memory)[torch.arange(len(given), device=read_BU.device), last_B]
    first_A = torch.tensor([[*text, model.end][0] for text in candidates], device=read_BU.device)
    return logits_BV[:, first_A].topk(count, dim=1).indices


def _allowed(constraint: Constraint, said_RL: Tensor, vocabulary: int) -> Tensor:
    state_R = constraint.start(len(said_RL), said_RL.device)
    masks = []
    for token_R in said_RL.unbind(1):
        masks.append(constraint.allowed(state_R, vocabulary))
        state_R = constraint.advance(state_R, token_R.clamp(min=0))
    return torch.stack(masks, 1)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

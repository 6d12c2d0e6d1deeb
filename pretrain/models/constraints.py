"""What a decoder may write next: one of some answers, exactly so many tokens of a range, no sequence twice.

A constraint is an automaton over tensors: each row has a state, which goes where the row goes (beams are reordered on
the device). OFA (Wang et al. 2022, arXiv:2202.03052) writes answers, four bins of a box and the codes of a picture so.

Shapes: R = rows, U = tokens, V = vocabulary, E = edges of a trie, Q = its states.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Constraint(ABC):
    """What may come next, by state; a row that has ended, or strayed, may only end."""

    longest: int  #: tokens that can be written, the end token included

    def start(self, rows: int, device: torch.device | str) -> Tensor:
        """Return the state of rows that have written nothing, int64 [R]."""
        return torch.zeros(rows, dtype=torch.int64, device=device)

    @abstractmethod
    def allowed(self, state_R: Tensor, vocabulary: int) -> Tensor:
        """Return which tokens may come next, bool [R, V]; at least one a row."""

    @abstractmethod
    def advance(self, state_R: Tensor, token_R: Tensor) -> Tensor:
        """Return the states after one more token."""


class Exactly(Constraint):
    """Exactly `tokens` of the ids first ... first + count - 1, then the end: bins of a box, codes of a picture."""

    def __init__(self, first: int, count: int, *, tokens: int, end: int) -> None:
        assert count > 0 and tokens > 0 and not first <= end < first + count
        self.first, self.count, self.tokens, self.end = first, count, tokens, end
        self.longest = tokens + 1

    def allowed(self, state_R: Tensor, vocabulary: int) -> Tensor:
        """Return the range while fewer tokens are written, then the end."""
        id_V = torch.arange(vocabulary, device=state_R.device)
        inside_V = (id_V >= self.first) & (id_V < self.first + self.count)
        return torch.where((state_R < self.tokens)[:, None], inside_V, id_V == self.end)

    def advance(self, state_R: Tensor, token_R: Tensor) -> Tensor:
        """Count."""
        return state_R + 1


class Answers(Constraint):
    """One of some answers, then the end: the trie of their tokens, walked on the device.

    An edge is a token that may follow a state; edges lie sorted by state and token. What leaves the trie, or comes
    behind an end, is in the last state, from which only the end leads on.
    """

    def __init__(self, answers: Sequence[Sequence[int]], *, end: int) -> None:
        assert len(answers), "at least one answer"
        self.longest = max(len(answer) for answer in answers) + 1
        self.end = end
        children: list[dict[int, int]] = [{}]
        ends: list[int] = []
        for answer in answers:
            node = 0
            for token in answer:
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                node = children[node][token]
            ends.append(node)
        last = len(children)
        children.append({end: last})
        for node in ends:
            children[node][end] = last
        edges = [(node, *edge) for node, found in enumerate(children) for edge in sorted(found.items())]
        self._last = last
        self._width = 1 + max(token for _, token, _ in edges)
        self._token_E = torch.tensor([token for _, token, _ in edges])
        self._child_E = torch.tensor([child for _, _, child in edges])
        self._key_E = torch.tensor([node * self._width + token for node, token, _ in edges])
        self._count_Q = torch.tensor([len(found) for found in children])
        self._begin_Q = self._count_Q.cumsum(0) - self._count_Q

    def allowed(self, state_R: Tensor, vocabulary: int) -> Tensor:
        """Return the tokens that lead on from each state."""
        self._to(state_R.device)
        count_R = self._count_Q[state_R]
        row_E = torch.arange(len(state_R), device=state_R.device).repeat_interleave(count_R)
        before_R = count_R.cumsum(0) - count_R
        place_E = torch.arange(len(row_E), device=state_R.device) - before_R[row_E] + self._begin_Q[state_R][row_E]
        out_RV = torch.zeros(len(state_R), vocabulary, dtype=torch.bool, device=state_R.device)
        out_RV[row_E, self._token_E[place_E]] = True
        return out_RV

    def advance(self, state_R: Tensor, token_R: Tensor) -> Tensor:
        """Follow an edge."""
        self._to(state_R.device)
        key_R = state_R * self._width + token_R
        place_R = torch.searchsorted(self._key_E, key_R).clamp(max=len(self._key_E) - 1)
        found_R = (self._key_E[place_R] == key_R) & (token_R < self._width)
        return torch.where(found_R, self._child_E[place_R], self._last)

    def _to(self, device: torch.device) -> None:
        if self._key_E.device != device:
            for name in ("_token_E", "_child_E", "_key_E", "_count_Q", "_begin_Q"):
                setattr(self, name, getattr(self, name).to(device))


def repeating(tokens_RU: Tensor, size: int, vocabulary: int) -> Tensor:
    """Return which tokens would end a sequence of `size` tokens that has been there before, bool [R, V]."""
    rows, length = tokens_RU.shape
    out_RV = torch.zeros(rows, vocabulary, dtype=torch.bool, device=tokens_RU.device)
    if length < size:
        return out_RV
    window_RWn = tokens_RU.unfold(1, size, 1)
    open_Rn = tokens_RU[:, length - size + 1 :]
    again_RW = (window_RWn[..., :-1] == open_Rn[:, None]).all(2)
    row, place = again_RW.nonzero(as_tuple=True)
    out_RV[row, window_RWn[row, place, -1]] = True
    return out_RV

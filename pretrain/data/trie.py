"""A trie of token sequences: which tokens may come next, in training (the allowed set of a loss) and in decoding.

A sequence is a candidate answer between the decoder's opening and the end token, as OFA constrains both (Wang et al.
2022, arXiv:2202.03052): after a prefix of candidates their next tokens may come; after any other prefix only the end.
"""

from collections.abc import Iterable, Sequence


class Trie:
    """Token sequences by their prefixes."""

    def __init__(self, sequences: Iterable[Sequence[int]], *, end: int) -> None:
        """Each of `sequences` is put in with `end` behind it."""
        self.end = end
        self._next: list[dict[int, int]] = [{}]
        for sequence in sequences:
            node = 0
            for token in (*sequence, end):
                if token not in self._next[node]:
                    self._next[node][token] = len(self._next)
                    self._next.append({})
                node = self._next[node][token]

    def next(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow a prefix, in rising order: only the end where no sequence begins so."""
        node = self._node(prefix)
        return sorted(self._next[node]) if node is not None and self._next[node] else [self.end]

    def __contains__(self, sequence: Sequence[int]) -> bool:
        """Return whether a sequence, without its end, was put in."""
        node = self._node(sequence)
        return node is not None and self.end in self._next[node]

    def _node(self, prefix: Sequence[int]) -> int | None:
        node: int | None = 0
        for token in prefix:
            node = self._next[node].get(token) if node is not None else None
        return node

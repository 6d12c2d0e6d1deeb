"""What comes more than once over all shards: 8 bytes a sample are kept, and a text is read again to be shown."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools import _tar
from pretrain.data import headers

MANY = 10  # rows of the list of repeated captions


class Repeats:
    """Collects one mark a sample, 0 for none, in the order of the shards."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._marks: list[NDArray[np.uint64]] = []
        self._found: tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]] | None = None

    def add(self, mark_N: NDArray[np.uint64]) -> None:
        """Take the marks of the next shard."""
        self._marks.append(mark_N)

    @property
    def different(self) -> int:
        """Return how many different marks there are."""
        return len(self._counted()[0])

    def later(self, examples: int) -> tuple[int, list[str]]:
        """Return how many samples have the mark of an earlier one, and the names of some."""
        if not self._marks:
            return 0, []
        whole = np.concatenate(self._marks)
        again = np.ones(len(whole), bool)
        again[self._counted()[1]] = False
        again &= whole != 0
        return int(again.sum()), [self.name(int(at)) for at in np.flatnonzero(again)[:examples]]

    def frequencies(self) -> dict[int, int]:
        """Return how many marks come once, twice, and so on."""
        often, captions = np.unique(self._counted()[2], return_counts=True)
        return dict(zip(often.tolist(), captions.tolist()))

    def name(self, position: int) -> str:
        """Return shard/key of the sample at a position."""
        path, row = self._place(position)
        return f"{path.name}/{headers.scan(path)[row].key}"

    def texts(self) -> list[tuple[str, int]]:
        """Return the first captions of the most frequent marks with their numbers, if above 1."""
        _, first, number = self._counted()
        order = np.lexsort((first, -number))[:MANY]
        found = []
        for at in order[number[order] > 1].tolist():
            path, row = self._place(int(first[at]))
            with _tar.opened(path) as tar:
                found.append((tar.captions(headers.scan(path)[row])[0], int(number[at])))
        return found

    def _place(self, position: int) -> tuple[Path, int]:
        starts = np.cumsum([0, *map(len, self._marks)])
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        return self.paths[shard], position - int(starts[shard])

    def _counted(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        if self._found is None:
            whole = np.concatenate(self._marks) if self._marks else np.zeros(0, np.uint64)
            different, first, number = np.unique(whole, return_index=True, return_counts=True)
            here = different != 0
            self._found = different[here], first[here], number[here]
        return self._found

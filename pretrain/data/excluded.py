"""What a run leaves out after a rollback: whole batches, and single samples for good.

Step t trains on the t-th batch that is not excluded: where batches 100 to 104 are out, step 100 shows batch 105 and all
later steps follow. So no sample is seen twice in their place, the order of all others stays, and the batch of a step is
still known without replaying. An excluded sample is replaced in every epoch by its neighbour, as an unusable one is.
All of it is a few numbers in a checkpoint's state, equal on all ranks.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.config import ConfigError

STATE_BYTES = 10_000  # a longer list is no accident in the data any more


class Sample(NamedTuple):
    """A sample by name, as Batch.source_B, .shards and .keys have it."""

    source: int
    shard: str  #: the file's name without its folder, so that a data set can move
    key: str


@dataclass(frozen=True)
class Excluded:
    """Batches and samples that are left out."""

    batches: tuple[tuple[int, int], ...] = ()  #: ranges [first, end) of batch numbers, sorted, with gaps between
    samples: frozenset[Sample] = frozenset()

    def batch_at(self, step: int) -> int:
        """Return the batch that step `step` (from 0) trains on."""
        for first, end in self.batches:
            if step < first:
                break
            step += end - first
        return step

    def without(
        self, *, steps: Iterable[int] = (), batches: Iterable[int] = (), samples: Iterable[Sample] = ()
    ) -> "Excluded":
        """Return this and also the batches that `steps` train on now, `batches` by number, and `samples`.

        Steps before the one that training goes on from must not be among them: the order up to there has been used.

        Raises:
            ConfigError: more is left out than a checkpoint's state may hold.
        """
        out_already = {n for first, end in self.batches for n in range(first, end)}
        numbers = sorted(out_already | set(map(self.batch_at, steps)) | set(batches))
        ranges: list[tuple[int, int]] = []
        for number in numbers:
            if ranges and ranges[-1][1] == number:
                ranges[-1] = (ranges[-1][0], number + 1)
            else:
                ranges.append((number, number + 1))
        out = Excluded(tuple(ranges), self.samples | frozenset(samples))
        size = len(json.dumps(out.state()))
        if size > STATE_BYTES:
            raise ConfigError(
                f"data: {len(ranges)} ranges of batches and {len(out.samples)} samples are to be left out after "
                f"rollbacks, {size} bytes of state where {STATE_BYTES} are allowed; the run does not recover: "
                "lower optim.lr, or take the samples out of the shards"
            )
        return out

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; nothing where nothing is left out."""
        batches, samples = [list(r) for r in self.batches], [list(s) for s in sorted(self.samples)]
        return {
            **({"excluded_batches": batches} if batches else {}),
            **({"excluded_samples": samples} if samples else {}),
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> "Excluded":
        """Return what `state` was made of."""
        batches = tuple((int(first), int(end)) for first, end in state.get("excluded_batches", ()))
        return Excluded(batches, frozenset(Sample(*sample) for sample in state.get("excluded_samples", ())))

"""`data.order: stream`: plain WebDataset reading, for shards that cannot be indexed (plain servers, gzip, pipes).

1. The shards of an epoch are permuted by (seed, epoch); the epochs follow each other in one endless sequence.
2. W ranks of V workers are W x V slots; slot k reads the shards at places k, k + WV, k + 2WV, ... of that sequence. So
   each shard is read once an epoch, no slot is ever without a shard, however few there are, and a rank whose shards
   are short is in its next epoch while others are still in this one.
3. A slot shuffles raw samples in a buffer, seeded by (seed, first place), decodes late and gives whole batches.

Approximate, where `exact` is exact: at the border of two epochs a sample may come twice before another has come once,
and batches depend on the number of ranks and workers. A run that goes on skips as many shards as it has used up, begins
with the next one and leaves behind what was in the buffer; from one such start the batches are always the same. With
fewer shards than slots, several slots are in the same shard at once, in different epochs and orders.
"""

import functools
import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from pretrain.batch import Batch, Record
from pretrain.data import names, tar_stream
from pretrain.data.compose import Composer, Row
from pretrain.data.format import ShardError
from pretrain.data.index import Catalog
from pretrain.data.instructions import base as instructions
from pretrain.data.loader import Config, plainly, worker_batches
from pretrain.data.order import Place, check_divisible, permutation
from pretrain.data.pipeline import Failure, Item, Steps, Travelling
from pretrain.data.readers import base
from pretrain.data.remote import Url
from pretrain.data.shards import Store
from pretrain.data.sources import Source
from pretrain.data.transforms import Transform
from pretrain.dist import hash64

MAX_BAD_SAMPLES, MAX_BAD_SHARDS = 1000, 30  # so many in a row are no accident


class StreamLoader:
    """Endless training batches of one rank from shards that are only ever read forward.

    `batch_size` is global. Bad samples are left out, and what is broken (samples and shards) is listed in `Batch.bad`.

    Raises:
        ConfigError: a bad pattern or reader, a pipe that is not allowed, or a batch that the ranks cannot share.
        ShardError: a local shard that is missing.
    """

    def __init__(
        self,
        config: Config,
        *,
        batch_size: int,
        seed: int,
        transform: Transform,
        composer: Composer,
        rank: int,
        world: int,
    ) -> None:
        check_divisible(batch_size, world)
        self.config, self.batch_size, self.seed, self.world = config, batch_size, seed, world
        self.shards = names.expand(config.shards, config)
        missing = next((path for path in self.shards if isinstance(path, Path) and not path.is_file()), None)
        if missing is not None:
            raise ShardError(f"shard {missing}: no such file; check data.shards and its braces")
        reader = base.make(config.reader, max_pixels=config.max_pixels)
        laid = instructions.make(config.instruction, others=None)
        store = Store(Catalog([], [], []), seed=seed)
        source = Source("", store, reader, instruction=laid, regions=config.regions)
        steps = Steps([source], transform, composer, augment=config.augment, decode=config.decode)
        self._samples = _Samples(self, steps, rank=rank)
        self._restored = 0  # batches that were given before the next iteration
        self._used: list[int] = []  # shards that each worker of this rank has used up since the start

    @property
    def samples_per_epoch(self) -> int:
        """Return `data.samples`; 0 where nobody has counted."""
        return self.config.samples or 0

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Return batches without end, from the shard that `restore` has named, else from the first.

        A batch has no place that could be worked out: `start_step` must be what was restored, or 0.

        Raises:
            ShardError: too many samples or shards in a row that cannot be used, or a server that cannot be reached.
        """
        assert start_step in (0, self._restored), f"batch {start_step} is wanted, {self._restored} was restored"
        workers = self.config.workers
        batches = worker_batches(self._samples, workers, sampler=None)
        return self._count(plainly(batches), max(1, workers))

    def _count(self, batches: Iterator[Any], workers: int) -> Iterator[Batch]:
        self._used = [0] * workers
        for number, (batch, used) in enumerate(batches):
            self._used[number % workers] = used  # DataLoader asks the workers in turn
            yield batch

    def state(self, done: int) -> dict[str, Any]:
        """Return what a checkpoint after `done` batches keeps: about where in the endless sequence of shards it is."""
        return {"batch": done, "shard": self._samples.first + self.world * sum(self._used)}

    def restore(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where a checkpoint's state says."""
        self._samples.first, self._used, self._restored = int(state["shard"]), [], int(state["batch"])

    def fingerprint(self) -> dict[str, Any]:
        """Return what defines the order of samples: a resumed run must agree on all of it."""
        words = "\n".join(shard.name for shard in self.shards)
        return {
            "shards": hashlib.blake2b(words.encode(), digest_size=8).hexdigest(),
            "order": self.config.order,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


class _Samples(IterableDataset[tuple[Batch, int]]):
    """What a worker process gets: all it takes to read the shards of its slot."""

    def __init__(self, loader: StreamLoader, steps: Steps, *, rank: int) -> None:
        self.shards, self.seed, self.steps = loader.shards, loader.seed, steps
        self.rows = loader.batch_size // loader.world
        self.buffer, self.retry_seconds = loader.config.buffer, loader.config.retry_seconds
        self.rank, self.world = rank, loader.world
        self.first = 0  #: place in the endless sequence of shards

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        buffer = max(1, self.buffer // workers)  # the rank's memory does not grow with its workers
        return _Slot(self, self.rank + self.world * number, self.world * workers).batches(buffer)


class _Slot:
    """One worker of one rank: the stages from shards to batches, and the counts by which a run goes on."""

    def __init__(self, samples: _Samples, slot: int, slots: int) -> None:
        self.of, self.slot, self.slots = samples, slot, slots
        self.news: list[dict[str, str]] = []  # for the next Batch.bad
        self.ends: deque[int] = deque()  # samples read up to the end of each shard that is not yet used up
        self.read = self.given = self.used = 0

    def batches(self, buffer: int) -> Iterator[tuple[Batch, int]]:
        """Yield batches, each with the number of shards that are used up: as many samples as they hold were given."""
        first = self.of.first + self.slot
        rng = random.Random(hash64(self.of.seed, "buffer", first))  # without one, shuffle takes the clock's
        shuffle = webdataset.filters.shuffle(buffer, initial=buffer // 10, rng=rng)
        _, example, row = self.of.steps.stages()
        shards = functools.partial(self._shards, first)
        return iter(webdataset.DataPipeline(shards, self._records, shuffle, example, row, self._usable, self._batched))

    def _shards(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, number of the shard) for ever."""
        known, order = -1, permutation(1, "")
        for place in itertools.count(first, self.slots):
            epoch, position = divmod(place, len(self.of.shards))
            if epoch != known:
                known, order = epoch, permutation(len(self.of.shards), self.of.seed, epoch, "shards")
            yield epoch, int(order[position])

    def _records(self, shards: Iterator[tuple[int, int]]) -> Iterator[Travelling]:
        """Yield what the shards hold, raw; a shard that breaks is listed and left."""
        failed = 0
        for epoch, number in shards:
            shard, before = self.of.shards[number], self.read
            try:
                for member, sample in enumerate(tar_stream.samples(shard, retry_seconds=self.of.retry_seconds)):
                    self.read += 1
                    yield self._travelling(Place(epoch, self.read, number, member), shard, sample)
                failed = 0
            except tar_stream.Broken as error:
                line = {"epoch": str(epoch), "shard": str(shard), "key": error.key, "reason": f"shard: {error}"}
                self.news.append(line)
                failed = 0 if self.read > before else failed + 1
                if failed >= MAX_BAD_SHARDS:
                    raise ShardError(
                        f"shard {shard}: {error}; the {failed - 1} before it gave nothing either"
                    ) from None
            self.ends.append(self.read)

    def _travelling(self, place: Place, shard: Path | Url, sample: tar_stream.Sample) -> Travelling:
        if sample.reason:
            return Failure(place, str(shard), sample.key, sample.reason)
        key = sample.key.encode("utf-8", "backslashreplace").decode()
        draw = hash64(self.of.seed, place.epoch, shard.name, key)  # as in the exact order
        record = Record(sample.key, str(shard), sample.fields, epoch=place.epoch, draw=draw)
        return Item(place, record, str(shard), sample.key)

    def _usable(self, items: Iterator[Travelling]) -> Iterator[Row]:
        failed = 0
        for item in items:
            self.given += 1
            while self.ends and self.ends[0] <= self.given:
                self.ends.popleft()
                self.used += 1
            if isinstance(item, Item):
                failed = 0
                yield item.value
                continue
            self.news.append(item.line())
            failed += 1
            if failed >= MAX_BAD_SAMPLES:
                raise ShardError(
                    f"shard {item.shard}: no usable sample at {item.key!r} nor at the {failed - 1} samples before it "
                    f"({item.reason}); check data.reader against the members; those of a sample must be neighbours"
                )

    def _batched(self, rows: Iterator[Row]) -> Iterator[tuple[Batch, int]]:
        while True:
            batch = self.of.steps.composer.collate(list(itertools.islice(rows, self.of.rows)))
            batch.bad, self.news = self.news, []
            yield batch, self.used

"""Batches for a rank: workers own whole batches, and what is in batch b depends on nothing but b.

Workers are forked: a fork starts in some 20 ms and inherits the open catalog, where a fork server would import torch
and the main script anew (seconds a rank). What makes forking delicate is kept away from them: they run one torch thread
(no OpenMP pool is entered), no tokenizer threads, and they never touch a device or a collective.
"""

import bisect
import gc
import hashlib
import itertools
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from pretrain.batch import Batch
from pretrain.data import index
from pretrain.data.compose import Composer, Row
from pretrain.data.decode import MAX_PIXELS
from pretrain.data.format import ShardError
from pretrain.data.order import Order, Place, check_divisible
from pretrain.data.pipeline import Item, Steps, evaluation_batch, training_batch
from pretrain.data.readers import base
from pretrain.data.remote import Access
from pretrain.data.shards import Store
from pretrain.data.transforms import Augment, Transform

PREFETCH = 2  # batches in flight per worker


class Config(Access):
    """The `data:` section."""

    shards: str | list[str]  #: paths, URLs and @lists with braces, e.g. icons/train-{00000..00011}.tar
    lanes: int = Field(default=64, ge=1)  #: streams that a batch is drawn from side by side
    window: int = Field(default=4, ge=1)  #: shards of a lane that are shuffled together
    workers: int = Field(default=2, ge=0)  #: processes per rank; 0: in the training process itself
    order: Literal["exact"] = "exact"
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)  #: more unusable samples than this stop the run
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)  #: larger images are unusable; read from the header
    reader: dict[str, dict[str, Any]] = {"caption": {}}  # noqa: RUF012 (pydantic copies it)
    augment: Augment = Augment()


class _Batches(Dataset[Batch]):
    """Batch number -> one rank's rows."""

    def __init__(self, order: Order, steps: Steps, rank: int, world: int) -> None:
        self.order, self.steps, self.rank, self.world = order, steps, rank, world

    def __getitem__(self, batch: int) -> Batch:
        self.steps.store.prefetch(batch, self.places)
        return training_batch(self.places(batch), self.order, self.steps)

    def places(self, batch: int) -> list[Place]:
        """Return this rank's rows of a batch."""
        return self.order.local(batch, self.rank, self.world)


class _Pass(Dataset[Batch]):
    """Batch number -> one rank's rows of a pass over every sample in the order of the shards."""

    def __init__(self, steps: Steps, sizes: list[int], *, batch_size: int, rank: int, world: int) -> None:
        self.steps, self.batch_size, self.rank, self.world = steps, batch_size, rank, world
        self.starts = [0, *itertools.accumulate(sizes)]
        self.samples = self.starts[-1]

    def __len__(self) -> int:
        return -(-self.samples // (self.batch_size * self.world))

    def __getitem__(self, batch: int) -> Batch:
        self.steps.store.prefetch(batch, self._places)
        begin = batch * self.batch_size * self.world
        return evaluation_batch(self._places(batch), self._rows(batch), self.steps, lambda: self._spare(begin))

    def _rows(self, batch: int) -> int:
        """Return the rows of each rank: the last batch may be smaller, but is equally small on all ranks."""
        left = min(self.samples - batch * self.batch_size * self.world, self.batch_size * self.world)
        return max(0, -(-left // self.world))

    def _places(self, batch: int) -> list[Place]:
        begin, rows = batch * self.batch_size * self.world, self._rows(batch)
        end = min(begin + self.batch_size * self.world, self.samples)
        return [self._place(n) for n in range(begin + self.rank * rows, min(begin + (self.rank + 1) * rows, end))]

    def _place(self, number: int) -> Place:
        shard = bisect.bisect_right(self.starts, number) - 1
        return Place(0, number, shard, number - self.starts[shard])

    def _spare(self, begin: int) -> Row:
        """Return the first usable sample at or after `begin`, around the end of the data set."""
        for step in range(self.samples):
            found = self.steps.one(self._place((begin + step) % self.samples))
            if isinstance(found, Item):
                row: Row = found.value
                return row
        raise ShardError(
            f"shard {self.steps.store.catalog.paths[0]}: none of the {self.samples} samples is usable; "
            "check data.reader against the members, `python -m data_tools validate` lists them"
        )


class _From:
    """A sampler of batch numbers start, start + 1, ... that can be set to another start."""

    def __init__(self) -> None:
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


class Loader:
    """Endless training batches of one rank, from any batch number.

    `batch_size` is global. `transform` and `composer` are the model's; `rank` of `world` takes its slice of each batch.

    Raises:
        ConfigError: a bad pattern or reader, or a batch that the ranks cannot share.
        ShardError: a shard that cannot be used.
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
        self.config = config
        self.batch_size = batch_size
        self.catalog = index.resolve(config.shards, config)
        index.warn_if_crowded(self.catalog, config, shards=config.lanes * config.window)
        self.order = Order(
            self.catalog.sizes, batch_size=batch_size, lanes=config.lanes, seed=seed, window=config.window
        )
        self._store = Store(self.catalog, seed=seed)
        reader = base.make(config.reader, max_pixels=config.max_pixels)
        steps = Steps(self._store, reader, transform, composer, augment=config.augment)
        self._from = _From()
        self._dataset = _Batches(self.order, steps, rank, world)
        self._batches = _batches(self._dataset, config.workers, sampler=self._from)

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples that an epoch sees once each."""
        return self.order.samples

    def iterate(self, start_batch: int = 0) -> Iterator[Batch]:
        """Return batches `start_batch`, `start_batch` + 1, ... without end. One iteration at a time.

        Raises:
            ShardError: no usable sample is left to put in a bad one's place, or a shard changed while it was read.
        """
        self._from.start = start_batch
        self._store.warm(self._dataset.places(start_batch))
        return _plainly(self._batches)

    def keys(self, batch: int) -> list[str]:
        """Return the keys of a global batch, all ranks' slices end to end (bad samples not yet replaced)."""
        return [self._store.key(place) for place in self.order.rows(batch)]

    def fingerprint(self) -> dict[str, Any]:
        """Return what defines the order of samples: a resumed run must agree on all of it."""
        names = "\n".join(f"{path.name} {size}" for path, size in zip(self.catalog.paths, self.catalog.sizes))
        return {
            "shards": hashlib.blake2b(names.encode(), digest_size=8).hexdigest(),
            "samples": self.order.samples,
            "order": self.config.order,
            "lanes": self.config.lanes,
            "window": self.config.window,
            "seed": self.order.seed,
            "batch_size": self.batch_size,
        }


def scan(
    shards: str | list[str],
    *,
    reader: dict[str, dict[str, Any]],
    transform: Transform,
    composer: Composer,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    access: Access | None = None,
) -> Iterator[Batch]:
    """Return one pass over shards: each sample once over all ranks, without augmentation, in the order of the shards.

    `batch_size` is rows per rank. All ranks get equally many batches of equally many rows; the last `Batch.filler` rows
    of a batch are copies that only make it so, drop them. Unusable samples are left out and listed in `Batch.bad`.

    Raises:
        ConfigError: a bad pattern or reader.
        ShardError: a shard that cannot be used, or no usable sample at all.
    """
    catalog = index.resolve(shards, access)
    made = base.make(reader, max_pixels=max_pixels)
    steps = Steps(Store(catalog, seed=0), made, transform, composer, augment=None)
    batches = _Pass(steps, catalog.sizes, batch_size=batch_size, rank=rank, world=world)
    return _plainly(_batches(batches, workers, sampler=range(len(batches))))


def _plainly(batches: DataLoader[Batch]) -> Iterator[Batch]:
    """Yield batches; give a worker's ShardError as the one sentence it was, without the worker's traceback."""
    try:
        yield from batches
        return
    except ShardError as error:
        sentence = str(error).rpartition("ShardError: ")[2].strip()
        traceback.clear_frames(error.__traceback__)  # a cycle of torch's that keeps the workers until it is collected
    del batches
    raise ShardError(sentence)


def _batches(dataset: Dataset[Batch], workers: int, *, sampler: Any) -> DataLoader[Batch]:
    options: dict[str, Any] = {}
    if workers:
        endless = not isinstance(sampler, range)
        options = {
            "multiprocessing_context": "fork",
            "persistent_workers": endless,
            "prefetch_factor": PREFETCH,
            "worker_init_fn": start_worker,
        }
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def start_worker(worker: int) -> None:
    """Prepare a worker process.

    A scheduler signals the whole process group when time is up, but the rank still needs batches to finish its step and
    save. So a worker leaves Ctrl-C and SIGUSR1 to its rank, and obeys a SIGTERM only if the rank itself has sent it.
    """
    gc.freeze()  # what is inherited is the rank's to collect, an older loader's clean-up above all
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start from here on inherit this
    threading.Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_end(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)

"""Batches for a rank: workers own whole batches, and what is in batch b depends on nothing but b.

Workers are forked: a fork starts in some 20 ms and inherits the open catalog, where a fork server would import torch
and the main script anew (seconds a rank). What makes forking delicate is kept away from them: they run one torch thread
(no OpenMP pool is entered), no tokenizer threads, and they never touch a device or a collective.
"""

import bisect
import functools
import gc
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pretrain.batch import Batch
from pretrain.data import index, sources
from pretrain.data.blend import BLOCK, Blend, Parts, Unit, lanes_of, shares, sizes_of
from pretrain.data.compose import Composer, Row
from pretrain.data.excluded import Excluded, Sample
from pretrain.data.format import ShardError
from pretrain.data.order import Order, Place, check_divisible
from pretrain.data.pipeline import Item, Steps, evaluation_batch, training_batch
from pretrain.data.regions import Config as Regions
from pretrain.data.remote import Access
from pretrain.data.sources import Source
from pretrain.data.transforms import Augment, Decode, Transform
from pretrain.dist import hash64

PREFETCH = 2  # batches in flight per worker
LOOK_SECONDS = 5  # between looks of a worker at whether its rank still lives


class Config(Access):
    """The `data:` section."""

    shards: str | list[str] = []  # noqa: RUF012  #: paths, URLs and @lists, e.g. icons/train-{00000..00011}.tar
    blend: list[sources.Config] = []  # noqa: RUF012  #: instead of shards: several data sets, drawn by weight
    blend_by: Unit = "sample"  #: batch: each global batch comes from one source
    lanes: int = Field(default=64, ge=1)  #: streams that a batch is drawn from side by side; sources share them
    window: int = Field(default=4, ge=1)  #: shards of a lane that are shuffled together
    workers: int = Field(default=2, ge=0)  #: processes per rank; 0: in the training process itself
    order: Literal["exact", "stream"] = "exact"  #: stream: shards that cannot be indexed, see pretrain/data/stream.py
    buffer: int = Field(default=10_000, ge=1)  #: stream: raw samples that a rank shuffles together, held in memory
    samples: int | None = Field(default=None, ge=1)  #: stream: samples of an epoch, which nobody has counted there
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)  #: more unusable samples than this stop the run
    decode: Decode = "fast"  #: exact: Pillow bit for bit, at half the rate; fast: see pretrain/data/transforms.py
    reader: dict[str, dict[str, Any]] = {"caption": {}}  # noqa: RUF012 (pydantic copies it)
    instruction: dict[str, dict[str, Any]] = {}  # noqa: RUF012  #: a paper's words around it, as {ofa: {tasks: [caption]}}
    regions: Regions | None = None  #: what a detector has found in the pictures; none: it is not read
    augment: Augment = Augment()

    @property
    def beside(self) -> sources.Beside:
        """Return what is done with samples between reader and composer."""
        return sources.Beside(instruction=self.instruction, regions=self.regions)

    @model_validator(mode="after")
    def _what_is_read(self) -> "Config":
        if bool(self.shards) == bool(self.blend):
            raise ValueError("give either shards (one data set) or blend (several, each with shards and a weight)")
        if self.blend and self.order == "stream":
            raise ValueError("order: stream reads one data set; name its shards, or blend with order: exact")
        sources.check(self.blend)
        return self


class _Wanted(NamedTuple):
    """What a worker is asked for."""

    batch: int
    excluded: frozenset[Sample]


class _Batches(Dataset[Batch]):
    """What is wanted -> one rank's rows."""

    def __init__(self, order: Order | Blend | Parts, steps: Steps, rank: int, world: int) -> None:
        self.order, self.steps, self.rank, self.world = order, steps, rank, world

    def __getitem__(self, wanted: _Wanted) -> Batch:
        among = sharers(self.steps)
        for number, source in enumerate(self.steps.sources):
            source.store.prefetch(wanted.batch, functools.partial(self.places, source=number), sharers=among)
        steps = self.steps.without(wanted.excluded)
        if not isinstance(self.order, Parts):
            return training_batch(self.places(wanted.batch), self.order, steps)
        minis = self.order.minis(wanted.batch, self.rank, self.world)
        first, second = (training_batch(places, self.order, steps) for places in minis)
        second.part = 1
        first.bad, second.bad, first.beside = [*first.bad, *second.bad], [], second
        return first

    def places(self, batch: int, *, source: int | None = None) -> list[Place]:
        """Return this rank's rows of a batch, or those of one source."""
        rows = self.order.local(batch, self.rank, self.world)
        return rows if source is None else [place for place in rows if place.source == source]


class _Pass(Dataset[Batch]):
    """Batch number -> one rank's rows of a pass over every sample in the order of the shards."""

    def __init__(
        self, steps: Steps, sizes: list[int], *, batch_size: int, rank: int, world: int, filled: bool, epoch: int
    ) -> None:
        self.steps, self.batch_size, self.rank, self.world, self.filled = steps, batch_size, rank, world, filled
        self.epoch = epoch
        self.starts = [0, *itertools.accumulate(sizes)]
        self.samples = self.starts[-1]

    def __len__(self) -> int:
        return -(-self.samples // (self.batch_size * self.world))

    def __getitem__(self, batch: int) -> Batch:
        self.steps.sources[0].store.prefetch(batch, self._places, sharers=sharers(self.steps))
        rows = self._rows(batch) if self.filled else None
        begin = batch * self.batch_size * self.world
        return evaluation_batch(self._places(batch), rows, self.steps, lambda: self._spare(begin))

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
        return Place(self.epoch, number, shard, number - self.starts[shard])

    def _spare(self, begin: int) -> Row:
        """Return the first usable sample at or after `begin`, around the end of the data set."""
        for step in range(self.samples):
            found = self.steps.one(self._place((begin + step) % self.samples))
            if isinstance(found, Item):
                row: Row = found.value
                return row
        raise ShardError(
            f"shard {self.steps.sources[0].store.catalog.paths[0]}: none of the {self.samples} samples is usable; "
            "check data.reader against the members, `python -m data_tools validate` lists them"
        )


class _From:
    """A sampler of what the steps start, start + 1, ... want; start and exclusions can be set anew."""

    def __init__(self) -> None:
        self.start = 0
        self.excluded = Excluded()

    def __iter__(self) -> Iterator[_Wanted]:
        out = self.excluded
        return (_Wanted(out.batch_at(step), out.samples) for step in itertools.count(self.start))


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
        self.sources, self.order = _open(config, batch_size=batch_size, seed=seed, world=world)
        catalogs = [source.store.catalog for source in self.sources]
        index.warn_if_crowded(catalogs, config, shards=config.lanes * config.window)
        steps = Steps(self.sources, transform, composer, augment=config.augment, decode=config.decode)
        self._from = _From()
        self._seed = seed
        self._dataset = _Batches(self.order, steps, rank, world)
        self._batches = worker_batches(self._dataset, config.workers, sampler=self._from)

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples that an epoch sees once each; of a blend, all sources' samples together.

        Of a blend it is a length only: so many are drawn by weight, more than all of some sources and less of others.
        """
        return self.order.samples

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Return the batches of the steps `start_step`, `start_step` + 1, ... without end. One iteration at a time.

        Raises:
            ShardError: no usable sample is left to put in a bad one's place, or a shard changed while it was read.
        """
        self._from.start = start_step
        first = self._from.excluded.batch_at(start_step)
        for number, source in enumerate(self.sources):
            source.store.warm(self._dataset.places(first, source=number))
        return plainly(self._batches)

    @property
    def excluded(self) -> Excluded:
        """Return what is left out."""
        return self._from.excluded

    def exclude(
        self, *, steps: Iterable[int] = (), batches: Iterable[int] = (), samples: Iterable[Sample] = ()
    ) -> None:
        """Leave out the batches that `steps` train on, `batches` by number, and `samples` for good.

        It holds from the next `iterate` on. All ranks call it alike, and `iterate` from no later than the first of
        them; where the newest batch itself is left out, the running iteration goes on with what its step then sees.

        Raises:
            ConfigError: a checkpoint's state cannot hold so much.
        """
        self._from.excluded = self._from.excluded.without(steps=steps, batches=batches, samples=samples)

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps after `step` steps: a few bytes, whatever the position."""
        return {"batch": step, **self._from.excluded.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Leave out what `state` says, from the next `iterate` on."""
        self._from.excluded = Excluded.restore(state)

    def keys(self, batch: int) -> list[str]:
        """Return the keys of a global batch, all ranks' slices end to end (bad samples not yet replaced)."""
        return [self.sources[place.source].store.key(place) for place in self.order.rows(batch)]

    def fingerprint(self) -> dict[str, Any]:
        """Return what defines the order of samples: a resumed run must agree on all of it."""
        catalogs = [source.store.catalog for source in self.sources]
        names = "\n".join(f"{path.name} {size}" for c in catalogs for path, size in zip(c.paths, c.sizes))
        tree: dict[str, Any] = {
            "shards": hashlib.blake2b(names.encode(), digest_size=8).hexdigest(),
            "samples": self.order.samples,
            "order": self.config.order,
            "lanes": self.config.lanes,
            "window": self.config.window,
            "seed": self._seed,
            "batch_size": self.batch_size,
        }
        if not isinstance(self.order, Order):
            blends = self.order.blends if isinstance(self.order, Parts) else [self.order]
            counts = [count for blend in blends for count in blend.counts_K.tolist()]
            samples = [order.samples for order in self.order.orders]
            tree["blend"] = {"by": blends[0].unit, "counts": counts, "samples": samples}
            if len(blends) > 1:
                tree["blend"]["parts"] = [source.part for source in self.config.blend]
        return tree


def _open(config: Config, *, batch_size: int, seed: int, world: int) -> tuple[list[Source], Order | Blend | Parts]:
    """Return the data sets that a config names and the order in which their samples come."""

    def order(number: int, source: Source, lanes: int, rows: int = batch_size) -> Order:
        sizes, own = source.store.catalog.sizes, source.store.seed
        return Order(sizes, batch_size=rows, lanes=lanes, seed=own, window=config.window, source=number)

    if not config.blend:
        single = sources.one(config.shards, config.reader, seed=seed, access=config, beside=config.beside)
        return [single], order(0, single, config.lanes)
    opened = sources.several(config.blend, config.reader, seed=seed, access=config, beside=config.beside)
    block = BLOCK[config.blend_by]
    weights = [given.weight or sum(found.store.catalog.sizes) for given, found in zip(config.blend, opened)]

    def blend(part: int, rows: int) -> Blend:
        mine = [number for number, given in enumerate(config.blend) if given.part == part]
        counts = shares([weights[number] for number in mine], block)
        lanes = [lanes_of(count, block=block, lanes=config.lanes) for count in counts]
        orders = [order(number, opened[number], some, rows) for number, some in zip(mine, lanes)]
        own = hash64(seed, "part", part) if part else seed  # equal mini-batches are not in step
        return Blend(orders, counts, seed=own, unit=config.blend_by)

    if not any(given.part for given in config.blend):
        return opened, blend(0, batch_size)
    of = [sum(weight for weight, given in zip(weights, config.blend) if given.part == part) for part in (0, 1)]
    return opened, Parts([blend(part, rows) for part, rows in enumerate(sizes_of(of, batch_size, world))])


def scan(
    shards: str | list[str] | index.Catalog,
    *,
    reader: dict[str, dict[str, Any]],
    transform: Transform,
    composer: Composer,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    filled: bool = True,
    decode: Decode = "exact",
    access: Access | None = None,
    augment: Augment | None = None,
    epoch: int = 0,
    seed: int = 0,
    beside: sources.Beside | None = None,
) -> Iterator[Batch]:
    """Return one pass over shards: each sample once over all ranks, in the order of the shards.

    Pictures are not augmented, or by `augment` with what the pass of that `epoch` and `seed` draws.
    `batch_size` is rows per rank. All ranks get equally many batches of equally many rows; the last `Batch.filler` rows
    of a batch are copies that only make it so, drop them. Unusable samples are left out and listed in `Batch.bad`.
    Ranks that need not keep in step say `filled=False`: there are no copies, and a batch may even be empty.

    Raises:
        ConfigError: a bad pattern or reader.
        ShardError: a shard that cannot be used, or no usable sample at all.
    """
    source = sources.one(shards, reader, seed=seed, access=access, beside=beside)
    steps = Steps([source], transform, composer, augment=augment, decode=decode)
    sizes = source.store.catalog.sizes
    batches = _Pass(steps, sizes, batch_size=batch_size, rank=rank, world=world, filled=filled, epoch=epoch)
    return plainly(worker_batches(batches, workers, sampler=range(len(batches))))


def plainly(batches: DataLoader[Any]) -> Iterator[Any]:
    """Yield batches; give a worker's ShardError as the one sentence it was, without the worker's traceback."""
    try:
        yield from batches
        return
    except ShardError as error:
        sentence = str(error).rpartition("ShardError: ")[2].strip()
        traceback.clear_frames(error.__traceback__)  # a cycle of torch's that keeps the workers until it is collected
    del batches
    raise ShardError(sentence)


def worker_batches(dataset: Dataset[Any], workers: int, *, sampler: Any) -> DataLoader[Any]:
    """Return what `workers` forked processes make of a data set; `sampler` None: the data set iterates by itself."""
    options: dict[str, Any] = {}
    if workers:
        endless = sampler is not None and not isinstance(sampler, range)
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


def sharers(steps: Steps) -> int:
    """Return among how many a rank's part of the cache is divided: each source of each of its workers."""
    worker = get_worker_info()
    return len(steps.sources) * (worker.num_workers if worker else 1)


def start_worker(worker: int) -> None:
    """Prepare a worker process.

    A scheduler signals the whole process group when time is up, but the rank still needs batches to finish its step and
    save. So a worker leaves Ctrl-C and SIGUSR1 to its rank, and obeys a SIGTERM only if the rank itself has sent it. It
    ends with its rank, even if that was killed while the worker started, which torch does not notice.
    """
    gc.freeze()  # what is inherited is the rank's to collect, an older loader's clean-up above all
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start from here on inherit this
    parent = multiprocessing.parent_process()
    rank = os.getppid() if parent is None or parent.pid is None else parent.pid
    threading.Thread(target=_wait_for_end, args=(rank,), daemon=True).start()


def _wait_for_end(rank: int) -> None:
    while os.getppid() == rank:
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
        if told is not None and told.si_pid == rank:
            break
    os._exit(0)

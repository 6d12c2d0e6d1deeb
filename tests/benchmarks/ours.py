"""What is measured of this project: contestants of the race in data.py.

python tests/benchmarks/ours.py WHAT SHARDS
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain.batch import Batch
from pretrain.data import format, index
from pretrain.data.compose import Composer
from pretrain.data.loader import Config, Loader
from pretrain.data.order import Order
from pretrain.data.shards import Store
from pretrain.data.tokenizer import load
from pretrain.data.transforms import Transform
from pretrain.models.vision import Config as Vision
from pretrain.models.vision import Normalise
from tests.benchmarks.race import contest

BATCH = 64
ROWS = 1024  # of a global batch: the order is worked out for all of it at once


def batches(shards: str, *, decode: str = "fast") -> Callable[[], Batch]:
    """Return a call that gives the next training batch, as the trainer gets it, without worker processes."""
    loader = Loader(
        Config(shards=shards, workers=0, lanes=16, decode=decode),
        batch_size=BATCH,
        seed=0,
        transform=Transform(224),
        composer=Composer(load("clip"), context_length=77),
        rank=0,
        world=1,
    )
    endless = loader.iterate()
    return lambda: next(endless)


def training(shards: str, *, decode: str = "fast", normalise: bool = False) -> Callable[[], int]:
    """Return a lap of four batches; `normalise` does on the CPU what the tower does on its device."""
    following, normal = batches(shards, decode=decode), Normalise(Vision().mean, Vision().std)

    def lap() -> int:
        for _ in range(4):
            batch = following()
            assert len(batch) == BATCH and not batch.bad
            if normalise:
                normal(batch.image_NCHW)
        return 4 * BATCH

    return lap


def decoder(shards: str) -> Callable[[], int]:
    """Return a lap of simplejpeg alone on the same files at full size: the ceiling."""
    import simplejpeg

    [path, *_] = index.expand(shards)
    with open(path, "rb") as file:
        files = [format.read_members(file, entry)["jpg"] for entry in format.scan(path)]
    return lambda: sum(bool(len(simplejpeg.decode_jpeg(data))) for data in files)


def records(shards: str) -> Callable[[], int]:
    """Return a lap of raw bytes in the order of training, without decoding."""
    catalog = index.resolve(shards)
    order = Order(catalog.sizes, batch_size=ROWS, lanes=16, seed=0)
    store, number = Store(catalog, seed=0), iter(range(1 << 40))

    def lap() -> int:
        count = 0
        for _ in range(8):
            for record in store(order.local(next(number), 0, 1)):
                count += bool(record.fields["jpg"] and record.fields["txt"])
        return count

    return lap


def first_batch(shards: str) -> None:
    """Print the seconds of wall and CPU time from nothing (but imports) to the first batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    batch = batches(shards)()
    print(time.perf_counter() - wall, time.process_time() - cpu, len(batch))


def indexing(shards: str) -> None:
    """Print the seconds of wall and CPU time that finding all samples takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    catalog = index.resolve(shards)
    print(time.perf_counter() - wall, time.process_time() - cpu, sum(catalog.sizes))


LAPS = {
    "fast": training,
    "exact": lambda shards: training(shards, decode="exact"),
    "normalised": lambda shards: training(shards, normalise=True),
    "decoder": decoder,
    "records": records,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    what, shards = sys.argv[1], str(Path(sys.argv[2]))
    if what in LAPS:
        contest(LAPS[what](shards))
    else:
        {"first_batch": first_batch, "indexing": indexing}[what](shards)

"""The stages from place to batch, on webdataset's DataPipeline.

places -> (record) -> (example) -> (row) -> repaired -> batches

A sample that cannot be used travels on as a Failure. In training, `repaired` puts a neighbour in its place: the sample
at the next position of the same epoch, or the one after, and so on: a rule that knows neither ranks nor workers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from webdataset import DataPipeline

from pretrain.batch import Batch, Example
from pretrain.config import ConfigError
from pretrain.data.compose import Composer, Row
from pretrain.data.decode import BadSample
from pretrain.data.format import ShardError
from pretrain.data.order import Order, Place
from pretrain.data.readers.base import Reader
from pretrain.data.shards import Store
from pretrain.data.transforms import Augment, Transform, generator

MAX_NEIGHBOURS = 1000  # so many bad samples in a row are no accident


@dataclass(slots=True)
class Failure:
    """A sample that cannot be used, and why."""

    place: Place
    shard: str
    key: str
    reason: str

    def line(self) -> dict[str, str]:
        """Return the sample as Batch.bad and quarantine.jsonl list it."""
        return {"epoch": str(self.place.epoch), "shard": self.shard, "key": self.key, "reason": self.reason}


@dataclass(slots=True)
class Item:
    """What travels from stage to stage: a place and what has become of its sample."""

    place: Place
    value: Any  #: Record, Example or Row
    shard: str
    key: str


Travelling = Item | Failure


class Steps:
    """The way of one sample, as functions that stages map over a stream; `augment` None is the evaluation transform."""

    def __init__(
        self, store: Store, reader: Reader, transform: Transform, composer: Composer, *, augment: Augment | None
    ) -> None:
        check_still(reader, augment)
        self.store, self.reader, self.transform, self.composer = store, reader, transform, composer
        self.augment = augment

    def record(self, place: Place) -> Travelling:
        """Read the bytes."""
        record = self.store.read(place)
        return Item(place, record, record.shard, record.key)

    def example(self, item: Travelling) -> Travelling:
        """Decode the bytes and see them as the task does."""
        return _attempt(item, self.reader.read)

    def row(self, item: Travelling) -> Travelling:
        """Transform the pictures and compose the text."""
        return _attempt(item, self._row)

    def one(self, place: Place) -> Travelling:
        """Take one sample all the way."""
        return self.row(self.example(self.record(place)))

    def stages(self) -> list[Callable[[Iterable[Any]], Iterator[Travelling]]]:
        """Return the three functions as stages of a DataPipeline."""
        return [_map(self.record), _map(self.example), _map(self.row)]

    def _row(self, example: Example) -> Row:
        if example.boxes_K4 is not None:
            rng = generator(example.draw)
            images = [self.transform.whole(image_HWC, self.augment, rng) for image_HWC in example.images]
        elif self.augment is None:
            images = [self.transform.evaluate(image_HWC) for image_HWC in example.images]
        else:
            rng = generator(example.draw)
            images = [self.transform.train(image_HWC, self.augment, rng) for image_HWC in example.images]
        return self.composer.row(example, images)


def check_still(reader: Reader, augment: Augment | None) -> None:
    """Refuse an augmentation that would move pictures away from the boxes of their reader.

    Raises:
        ConfigError: with the keys to leave out.
    """
    if reader.boxes and augment is not None and augment.moving():
        raise ConfigError(
            f"data.augment: {', '.join(augment.moving())} would move the pictures away from the boxes that this "
            "data.reader gives; leave these keys out, colours may change"
        )


def _attempt(item: Travelling, function: Callable[[Any], Any]) -> Travelling:
    """Apply a function; only what is wrong with the sample itself is caught, never a full disk or a missing import."""
    if isinstance(item, Failure):
        return item
    try:
        item.value = function(item.value)
    except BadSample as error:
        return Failure(item.place, item.shard, item.key, str(error))
    return item


def _map(function: Callable[[Any], Travelling]) -> Callable[[Iterable[Any]], Iterator[Travelling]]:
    def stage(items: Iterable[Any]) -> Iterator[Travelling]:
        for item in items:
            yield function(item)

    return stage


def training_batch(places: list[Place], order: Order, steps: Steps) -> Batch:
    """Return one rank's rows of a training batch, bad samples replaced and listed in `Batch.bad`."""

    def repaired(items: Iterable[Travelling]) -> Iterator[tuple[Row, list[dict[str, str]]]]:
        for item in items:
            if isinstance(item, Failure):
                yield neighbour(item, order, steps).value, [item.line()]
            else:
                yield item.value, []

    def batched(rows: Iterable[tuple[Row, list[dict[str, str]]]]) -> Iterator[Batch]:
        good, bad = zip(*rows)
        batch = steps.composer.collate(list(good))
        batch.bad = [line for lines in bad for line in lines]
        yield batch

    batch: Batch = next(iter(DataPipeline(lambda: iter(places), *steps.stages(), repaired, batched)))
    return batch


def neighbour(failure: Failure, order: Order, steps: Steps) -> Item:
    """Return the sample that stands in for a bad one.

    Raises:
        ShardError: a thousand in a row, or all there are, cannot be used.
    """
    epoch, position = failure.place.epoch, failure.place.position
    tries = min(order.samples - 1, MAX_NEIGHBOURS)
    for distance in range(1, tries + 1):
        item = steps.one(order.place(epoch, position + distance))
        if isinstance(item, Item):
            return item
    raise ShardError(
        f"shard {failure.shard}: no usable sample at {failure.key!r} nor at the {tries} positions after it "
        f"({failure.reason}); check data.reader against the members, `python -m data_tools validate` lists them"
    )


def evaluation_batch(places: list[Place], rows: int, steps: Steps, spare: Callable[[], Row]) -> Batch:
    """Return usable samples of `places`, filled up to `rows` rows; bad ones are left out and listed in `Batch.bad`.

    `spare` gives the filler where the batch itself has no usable sample.
    """

    def batched(items: Iterable[Travelling]) -> Iterator[Batch]:
        seen = list(items)
        good: list[Row] = [item.value for item in seen if isinstance(item, Item)]
        filler = rows - len(good)
        fill = (good[-1] if good else spare()) if filler else None
        batch = steps.composer.collate(good + [fill] * filler if fill is not None else good)
        batch.bad = [item.line() for item in seen if isinstance(item, Failure)]
        batch.filler = filler
        yield batch

    batch: Batch = next(iter(DataPipeline(lambda: iter(places), *steps.stages(), batched)))
    return batch

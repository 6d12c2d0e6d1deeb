"""The stages from place to batch, on webdataset's DataPipeline.

places -> (record) -> (example) -> (row) -> repaired -> batches

A sample that cannot be used travels on as a Failure. In training, `repaired` puts a neighbour in its place: the sample
at the next position of the same epoch of its source, or the one after, and so on: a rule that knows neither ranks nor
workers.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from webdataset import DataPipeline

from pretrain.batch import Batch, Example
from pretrain.config import ConfigError
from pretrain.data.blend import Blend, Parts
from pretrain.data.compose import Composer, Row
from pretrain.data.decode import BadSample
from pretrain.data.excluded import Sample
from pretrain.data.format import ShardError
from pretrain.data.order import Order, Place
from pretrain.data.sources import Source
from pretrain.data.transforms import Augment, Decode, Transform, generator

MAX_NEIGHBOURS = 1000  # so many bad samples in a row are no accident


@dataclass(slots=True)
class Failure:
    """A sample that cannot be used, and why."""

    place: Place
    shard: str
    key: str
    reason: str
    source: str = ""  #: the source's name, where there are several
    excluded: bool = False  #: left out on purpose, not for being unusable

    def line(self) -> dict[str, str]:
        """Return the sample as Batch.bad and quarantine.jsonl list it."""
        source = {"source": self.source} if self.source else {}
        return {**source, "epoch": str(self.place.epoch), "shard": self.shard, "key": self.key, "reason": self.reason}


@dataclass(slots=True)
class Item:
    """What travels from stage to stage: a place and what has become of its sample."""

    place: Place
    value: Any  #: Record, Example or Row
    shard: str
    key: str


Travelling = Item | Failure


class Steps:
    """The way of one sample, as functions that stages map over a stream.

    `augment` is of sources that have none of their own; None is the evaluation transform, for all.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        transform: Transform,
        composer: Composer,
        *,
        augment: Augment | None,
        decode: Decode = "exact",
    ) -> None:
        self.sources, self.composer = list(sources), composer
        self.transforms = [transform.sized(source.image_size) for source in sources]
        self.augments = [augment and (source.augment or augment) for source in sources]
        for source, own in zip(sources, self.augments):
            check_still(source, own)
            check_symbols(source, composer)
        check_regions(sources)
        self.exact = decode == "exact"
        self.excluded: frozenset[Sample] = frozenset()

    def without(self, excluded: frozenset[Sample]) -> "Steps":
        """Return the same steps, on which these samples fail."""
        if not excluded and not self.excluded:
            return self
        steps = copy.copy(self)
        steps.excluded = excluded
        return steps

    def record(self, place: Place) -> Travelling:
        """Read the bytes."""
        source = self.sources[place.source]
        if self.excluded:
            path, key = source.store.catalog.paths[place.shard], source.store.key(place)
            if Sample(place.source, path.name, key) in self.excluded:
                return Failure(place, str(path), key, "left out after a rollback", source.name, excluded=True)
        record = source.store.read(place)
        return Item(place, record, record.shard, record.key)

    def example(self, item: Travelling) -> Travelling:
        """See the bytes as the task does, pictures decoded and transformed."""
        source, augment = self.sources[item.place.source], self.augments[item.place.source]
        transform = self.transforms[item.place.source]
        return self._attempt(
            item, lambda record: self._seen(source.example(record, transform.size), transform, augment)
        )

    def row(self, item: Travelling) -> Travelling:
        """Compose the text."""
        return self._attempt(item, lambda example: self.composer.row(example, example.images))

    def one(self, place: Place) -> Travelling:
        """Take one sample all the way."""
        return self.row(self.example(self.record(place)))

    def stages(self) -> list[Callable[[Iterable[Any]], Iterator[Travelling]]]:
        """Return the three functions as stages of a DataPipeline."""
        return [_map(self.record), _map(self.example), _map(self.row)]

    def _seen(self, example: Example, transform: Transform, augment: Augment | None) -> Example:
        """Return an example whose pictures are pixels of the tower's size."""
        rng, exact = generator(example.draw), self.exact
        if example.boxes_K4 is not None or example.regions_K4 is not None or example.codes:
            example.images = [transform.whole(p, augment, rng, exact=exact) for p in example.images]
        elif augment is None:
            example.images = [transform.evaluate(picture, exact=exact) for picture in example.images]
        else:
            example.images = [transform.train(p, augment, rng, exact=exact) for p in example.images]
        return example

    def _attempt(self, item: Travelling, function: Callable[[Any], Any]) -> Travelling:
        """Apply a function; only what is wrong with the sample itself is caught, never a full disk or an import."""
        if isinstance(item, Failure):
            return item
        try:
            item.value = function(item.value)
        except BadSample as error:
            source = self.sources[item.place.source].name
            return Failure(item.place, item.shard, item.key, str(error), source)
        return item


def check_still(source: Source, augment: Augment | None) -> None:
    """Refuse an augmentation that would move pictures away from their boxes, regions or codes.

    Raises:
        ConfigError: with the keys to leave out.
    """
    still = source.reader.boxes or source.reader.codes or source.regions is not None
    if still and augment is not None and augment.moving():
        what = "codes" if source.reader.codes else "boxes" if source.reader.boxes else "regions"
        raise ConfigError(
            f"data.augment: {', '.join(augment.moving())} would move the pictures away from the {what} that this "
            f"data.{'regions' if what == 'regions' else 'reader'} gives; leave these keys out (of one source of a "
            "blend: give it an augment of its own), colours may change"
        )


def check_symbols(source: Source, composer: Composer) -> None:
    """Refuse an instruction that lays symbols which the vocabulary has not.

    Raises:
        ConfigError: names the first of them.
    """
    missing = next((name for name in source.symbols if composer.tokenizer.symbol(name) is None), None)
    if missing is not None:
        raise ConfigError(
            f"data.instruction{f' of source {source.name!r}' if source.name else ''}: it lays {missing}, which the "
            "model's vocabulary has not; choose a model with such symbols, or tasks without"
        )


def check_regions(sources: Sequence[Source]) -> None:
    """Refuse boxes with and without a detector's features in one batch.

    Raises:
        ConfigError: names the sources.
    """
    featured = [one.name for one in sources if one.regions is not None and one.regions.features is not None]
    bare = [one.name for one in sources if one.name not in featured and (one.reader.boxes or one.regions is not None)]
    if featured and bare:
        raise ConfigError(
            f"data.blend: sources {', '.join(map(repr, featured))} give features of their regions, "
            f"{', '.join(map(repr, bare))} give boxes without; give regions.features to all of them"
        )


def _map(function: Callable[[Any], Travelling]) -> Callable[[Iterable[Any]], Iterator[Travelling]]:
    def stage(items: Iterable[Any]) -> Iterator[Travelling]:
        for item in items:
            yield function(item)

    return stage


def _whole(stage: Callable[[Iterable[Any]], Iterator[Any]]) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Let a stage finish a batch before the next begins: its code stays in the processor's caches."""
    return lambda items: iter(list(stage(items)))


def training_batch(places: list[Place], order: Order | Blend | Parts, steps: Steps) -> Batch:
    """Return one rank's rows of a training batch, bad samples replaced and listed in `Batch.bad`."""

    def repaired(items: Iterable[Travelling]) -> Iterator[tuple[Row, list[dict[str, str]]]]:
        for item in items:
            if isinstance(item, Failure):
                yield neighbour(item, order, steps).value, [] if item.excluded else [item.line()]
            else:
                yield item.value, []

    def batched(rows: Iterable[tuple[Row, list[dict[str, str]]]]) -> Iterator[Batch]:
        good, bad = zip(*rows)
        batch = steps.composer.collate(list(good))
        batch.bad = [line for lines in bad for line in lines]
        if len(steps.sources) > 1:
            batch.source_B = torch.tensor([place.source for place in places])
        yield batch

    batch: Batch = next(iter(DataPipeline(lambda: iter(places), *map(_whole, steps.stages()), repaired, batched)))
    return batch


def neighbour(failure: Failure, order: Order | Blend | Parts, steps: Steps) -> Item:
    """Return the sample that stands in for a bad one.

    Raises:
        ShardError: a thousand in a row, or all there are, cannot be used.
    """
    tries = 0
    for place in itertools.islice(order.neighbours(failure.place), MAX_NEIGHBOURS):
        item = steps.one(place)
        if isinstance(item, Item):
            return item
        tries += 1
    raise ShardError(
        f"shard {failure.shard}: no usable sample at {failure.key!r} nor at the {tries} positions after it "
        f"({failure.reason}); check data.reader against the members, `python -m data_tools validate` lists them"
    )


def evaluation_batch(places: list[Place], rows: int | None, steps: Steps, spare: Callable[[], Row]) -> Batch:
    """Return usable samples of `places`, filled up to `rows` rows; bad ones are left out and listed in `Batch.bad`.

    `spare` gives the filler where the batch itself has no usable sample. Without `rows` nothing is filled up.
    """

    def batched(items: Iterable[Travelling]) -> Iterator[Batch]:
        seen = list(items)
        good: list[Row] = [item.value for item in seen if isinstance(item, Item)]
        filler = 0 if rows is None else rows - len(good)
        fill = (good[-1] if good else spare()) if filler else None
        filled = good + [fill] * filler if fill is not None else good
        batch = steps.composer.collate(filled) if filled else Batch(keys=[])
        batch.bad = [item.line() for item in seen if isinstance(item, Failure)]
        batch.filler = filler
        yield batch

    batch: Batch = next(iter(DataPipeline(lambda: iter(places), *map(_whole, steps.stages()), batched)))
    return batch

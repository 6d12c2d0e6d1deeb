"""A split as a table of features: the batches that its pictures would give, without decoding or a tower.

Order, replaced and left-out samples, resume and the cut into ranks are those of pretrain/data/loader.py.
Shapes: N = samples of the split, B = rows, D = feature width.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune import features
from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.data import loader, sources
from pretrain.data.decode import BadSample
from pretrain.data.excluded import Sample
from pretrain.data.format import ShardError
from pretrain.data.order import Place
from pretrain.data.pipeline import MAX_NEIGHBOURS, Failure, Steps
from pretrain.data.remote import Access
from pretrain.pretrained import Pretrained

FIELDS = {"image": "image_NE", "pooled": "pooled_NC"}  #: of a Batch, by kind of feature


@dataclass
class Encoded:
    """The samples of a split in the order of its shards, the same on every rank."""

    shards: list[str]
    starts: list[int]  #: the number of each shard's first sample
    keys: list[str]
    paths: list[str]  #: each sample's shard
    target_N: Tensor  #: int64
    features: dict[str, Tensor]  #: by field of a Batch: float32 [N, D]
    bad: dict[int, str]  #: why a sample cannot be used, by number

    def batch(self, rows: list[int]) -> Batch:
        """Return samples by number as a batch."""
        index_B = torch.tensor(rows, dtype=torch.int64)
        fields: dict[str, Any] = {name: rows_ND[index_B] for name, rows_ND in self.features.items()}
        return Batch(
            keys=[self.keys[n] for n in rows],
            shards=[self.paths[n] for n in rows],
            target_B=self.target_N[index_B],
            meta=[{} for _ in rows],
            **fields,
        )

    def scan(self, batch_size: int) -> Iterator[Batch]:
        """Return one pass of this rank over the usable samples, cut as `loader.scan` cuts it."""
        usable = [n for n in range(len(self.keys)) if n not in self.bad]
        if not usable:
            raise ShardError(f"shard {self.shards[0]}: none of the {len(self.keys)} samples is usable")
        world, rank = dist.world(), dist.rank()
        for begin in range(0, len(usable), batch_size * world):
            part = usable[begin : begin + batch_size * world]
            rows = -(-len(part) // world)
            own = part[rank * rows : (rank + 1) * rows]
            filler = rows - len(own)
            batch = self.batch(own + [own[-1] if own else part[0]] * filler)
            batch.filler = filler
            yield batch


def encode(
    shards: list[str],
    kinds: tuple[str, ...],
    *,
    base: Pretrained,
    reader: str,
    access: Access,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Encoded:
    """Return a split's features: from the cache, and what it lacks from the model. All ranks call it.

    Raises:
        ShardError: a shard that cannot be used.
    """
    source = sources.one(shards, {reader: {}}, seed=0, access=access)
    steps = Steps([source], base.transform, base.composer, augment=None, decode="exact")
    sizes = source.store.catalog.sizes
    places = [Place(0, 0, shard, member) for shard, size in enumerate(sizes) for member in range(size)]
    listed = _list(steps, places)
    where = {row.digest: place for place, row in reversed(list(zip(places, listed))) if row.digest is not None}
    caches = {kind: features.Cache(access, base, kind) for kind in kinds}
    why = features.encode(steps, where, base=base, caches=caches, batch_size=batch_size, workers=workers, device=device)
    bad = {n: row.reason for n, row in enumerate(listed) if row.reason}
    bad |= {n: why[row.digest] for n, row in enumerate(listed) if row.digest in why}
    digest_N = np.array([-1 if row.digest is None else row.digest for row in listed], dtype=np.int64)
    widths = {"image": base.config.embed_dim, "pooled": base.model.vision.width}
    unusable = {int(digest_N[n]) for n in bad}
    found = {FIELDS[k]: cache.everywhere(digest_N, widths[k], but=unusable) for k, cache in caches.items()}
    return Encoded(
        shards=shards,
        starts=[0, *itertools.accumulate(sizes)][:-1],
        keys=[row.key for row in listed],
        paths=[str(source.store.catalog.paths[place.shard]) for place in places],
        target_N=torch.tensor([row.target for row in listed], dtype=torch.int64),
        features=found,
        bad=bad,
    )


@dataclass
class _Listed:
    """What is known of a sample before its picture is decoded."""

    key: str
    target: int
    digest: int | None
    reason: str  #: why it cannot be used


def _list(steps: Steps, places: list[Place]) -> list[_Listed]:
    """Return what each sample is, each rank reading its part of the shards."""
    share = -(-len(places) // dist.world())
    mine = [_look(steps, place) for place in places[dist.rank() * share :][:share]]
    return [row for part in dist.gather_objects(mine) for row in part]


def _look(steps: Steps, place: Place) -> _Listed:
    [source] = steps.sources
    record = source.store.read(place)
    try:
        example = source.reader.read(record)
    except BadSample as error:
        return _Listed(record.key, -1, None, str(error))
    return _Listed(record.key, example.target, features.digest(record.fields), "")


class Loader(loader.Loader):
    """Endless training batches of features, in the order and with the state of the loader of pictures."""

    def __init__(self, encoded: Encoded, config: loader.Config, **options: Any) -> None:
        """Take the table, and what a loader of the same pictures would be given."""
        super().__init__(config.model_copy(update={"workers": 0}), **options)
        self.encoded = encoded

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Return the batches of the steps `start_step`, `start_step` + 1, ... without end."""
        out = self.excluded
        return (self._batch(out.batch_at(step), out.samples) for step in itertools.count(start_step))

    def _batch(self, number: int, excluded: frozenset[Sample]) -> Batch:
        places = self._dataset.places(number)
        if not excluded and not self.encoded.bad:
            return self.encoded.batch([self._row(place) for place in places])
        rows, lines = [], []
        for place in places:
            failure = self._failure(place, excluded)
            rows.append(self._row(place) if failure is None else self._neighbour(failure, excluded))
            lines += [failure.line()] if failure is not None and not failure.excluded else []
        batch = self.encoded.batch(rows)
        batch.bad = lines
        return batch

    def _row(self, place: Place) -> int:
        return self.encoded.starts[place.shard] + place.member

    def _failure(self, place: Place, excluded: frozenset[Sample]) -> Failure | None:
        row = self._row(place)
        key, path = self.encoded.keys[row], self.sources[0].store.catalog.paths[place.shard]
        if excluded and Sample(0, path.name, key) in excluded:
            return Failure(place, str(path), key, "left out after a rollback", excluded=True)
        reason = self.encoded.bad.get(row)
        return None if reason is None else Failure(place, str(path), key, reason)

    def _neighbour(self, failure: Failure, excluded: frozenset[Sample]) -> int:
        """Return the sample that stands in for a bad one, by the rule of pipeline.neighbour."""
        for place in itertools.islice(self.order.neighbours(failure.place), MAX_NEIGHBOURS):
            if self._failure(place, excluded) is None:
                return self._row(place)
        raise ConfigError(f"task.data: no usable sample at {failure.key!r} nor after it ({failure.reason})")

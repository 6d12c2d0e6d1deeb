"""Where samples come from: shards and the reader that understands them, one data set or several."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import ConfigError, Section
from pretrain.data import index
from pretrain.data.index import Catalog
from pretrain.data.instructions import base as instructions
from pretrain.data.order import Place
from pretrain.data.readers import base
from pretrain.data.regions import Config as Regions
from pretrain.data.regions import attach
from pretrain.data.remote import Access
from pretrain.data.shards import Store
from pretrain.data.transforms import Augment
from pretrain.dist import hash64


class Config(Section):
    """One entry of `data.blend`."""

    shards: str | list[str]  #: as data.shards
    weight: float | None = Field(default=None, gt=0)  #: share of samples or batches; none: its number of samples
    reader: dict[str, dict[str, Any]] | None = None  #: none: data.reader
    part: Literal[0, 1] = 0  #: which mini-batch of a step it is drawn into; each has the share of its sources' weights
    image_size: int | None = Field(default=None, gt=0)  #: pixels a side; none: the model's, which must read others too
    instruction: dict[str, dict[str, Any]] | None = None  #: none: data.instruction
    regions: Regions | None = None  #: none: data.regions
    augment: Augment | None = None  #: none: data.augment; boxes need pictures that stay where they are
    name: str = ""  #: in quarantine.jsonl; none: its place in the list, from 0


class Source(NamedTuple):
    """An open data set."""

    name: str  #: empty where it is the only one
    store: Store
    reader: base.Reader
    augment: Augment | None = None  #: none: as the others
    instruction: instructions.Instruction | None = None
    regions: Regions | None = None
    image_size: int | None = None  #: none: the model's

    def example(self, record: Record, side: int) -> Example:
        """Return a sample as the model is told it, its pictures in squares of `side` pixels.

        Raises:
            BadSample: it cannot be used.
        """
        found = self.reader.read(record)
        if self.regions is not None:
            found = attach(found, record, self.regions)
        return found if self.instruction is None else self.instruction.lay(found, side)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return symbols that its instruction lays: the vocabulary must have them."""
        return () if self.instruction is None else self.instruction.symbols()


class Beside(Section):
    """What is done with a sample between reader and composer."""

    instruction: dict[str, dict[str, Any]] = {}  # noqa: RUF012  #: a paper's words around it, as {ofa: {tasks: [caption]}}
    regions: Regions | None = None  #: what a detector has found in its picture; none: it is not read

    def of(self, source: Config) -> "Beside":
        """Return what is done with samples of one source of a blend."""
        instruction = self.instruction if source.instruction is None else source.instruction
        return Beside(instruction=instruction, regions=source.regions or self.regions)


def check(blend: Sequence[Config]) -> None:
    """Refuse entries that contradict each other.

    Raises:
        ValueError: some weights are given and some are not, or two entries share a name.
    """
    if len({source.weight is None for source in blend}) > 1:
        raise ValueError("give a weight to each source or to none (none: in proportion to their samples)")
    if {source.part for source in blend} == {1}:
        raise ValueError("part: 1 is the second mini-batch of a step; give some source part: 0")
    for part in (0, 1):
        sizes = {source.image_size for source in blend if source.part == part}
        if len(sizes) > 1:
            raise ValueError(f"image_size: pictures of part {part} go into one batch; give all its sources the same")
    names = [name_of(source, number) for number, source in enumerate(blend)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two sources are called {twice!r}; give each a name of its own")


def name_of(source: Config, number: int) -> str:
    """Return what reports call entry `number` of a blend."""
    return source.name or str(number)


def one(
    shards: str | list[str] | Catalog,
    reader: dict[str, Any],
    *,
    seed: int,
    access: Access | None = None,
    beside: Beside | None = None,
) -> Source:
    """Return a data set that is the only one.

    Raises:
        ConfigError: a bad pattern or reader.
        ShardError: a shard that cannot be used.
    """
    access = access or Access()
    made = base.make(reader, max_pixels=access.max_pixels)
    catalog = shards if isinstance(shards, Catalog) else index.resolve(shards, access)
    store = Store(catalog, seed=seed)
    if beside is None:
        return Source("", store, made)
    near = catalog.depot is None and sum(catalog.sizes) > 0  # of remote shards, each would be a download
    others = functools.partial(_other, store, made) if near else None
    laid = instructions.make(beside.instruction, others=others)
    return Source("", store, made, instruction=laid, regions=beside.regions)


def _other(store: Store, reader: base.Reader, number: int) -> Example:
    """Return some sample of a data set, drawn by `number`, as its reader reads it."""
    ends = list(itertools.accumulate(store.catalog.sizes))
    position = hash64(number, "place") % ends[-1]
    shard = bisect.bisect_right(ends, position)
    record = store.read(Place(0, position, shard, position - (ends[shard] - store.catalog.sizes[shard])))
    return reader.read(replace(record, draw=number))


def several(
    blend: Sequence[Config],
    reader: dict[str, Any],
    *,
    seed: int,
    access: Access | None = None,
    beside: Beside | None = None,
) -> list[Source]:
    """Return the data sets of a blend; each draws from a seed of its own, so that equal ones are not in step.

    Raises:
        ConfigError: a bad pattern or reader; the message names the source.
        ShardError: a shard that cannot be used.
    """
    out = []
    for number, section in enumerate(blend):
        name = name_of(section, number)
        own = hash64(seed, "source", number)
        try:
            mine = (beside or Beside()).of(section)
            made = one(section.shards, section.reader or reader, seed=own, access=access, beside=mine)
        except ConfigError as error:
            raise ConfigError(f"data.blend, source {name!r}: {error}") from None
        out.append(made._replace(name=name, augment=section.augment, image_size=section.image_size))
    return out

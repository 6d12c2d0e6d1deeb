"""How long a run is and what it reads: samples, steps, epochs, shards a rank, remote working set, time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain import recipe as recipes
from pretrain.config import ConfigError
from pretrain.data import format, sources
from pretrain.data.decode import BadSample
from pretrain.data.format import Listed, ShardError
from pretrain.data.names import expand
from pretrain.data.order import Place
from pretrain.data.shards import Store
from pretrain.data.sources import Source
from pretrain.data.tokenizer import Tokenizer
from pretrain.recipe import Recipe

CAPTIONS = 256  # captions that are read to see how long texts are
PEAK_SHARE = {"cuda": 0.35, "cpu": 0.5}  # of the peak that training reaches, where nobody gives a throughput


@dataclass(frozen=True)
class Outlook:
    """What is known of a run's data and length; None: not without reading more than names and indexes."""

    shards: int
    remote: int  #: of which not on this machine
    missing: int  #: local ones that are not there
    samples: int | None  #: of an epoch
    bytes: int | None  #: of the shards that are counted
    steps: int | None
    epochs: float | None
    shards_per_rank: float  #: shards that a rank reads of an epoch, were they dealt out
    open_shards: int  #: that batches are drawn from at a time
    working_set: int | None  #: bytes of these


def look(recipe: Recipe, *, world: int) -> Outlook:
    """Return what names, dataset.json and indexes tell; opens no shard and no connection.

    Raises:
        ConfigError: no shards are named.
    """
    data = recipe.data
    named = [data.shards] if data.shards else [source.shards for source in data.blend]
    paths = [path for shards in named for path in expand(shards, data)]
    local = [path for path in paths if isinstance(path, Path)]
    counts = list(_counted(local))
    known = [found for found in counts if found is not None]
    whole = len(known) == len(paths)
    samples = data.samples if data.order == "stream" else sum(n for n, _ in known) if whole else None
    steps: int | None
    try:
        steps = recipe.train.total_steps(samples or 0)
    except ConfigError:
        steps = None
    size = sum(length for _, length in known)
    drawn = min(len(paths), data.lanes * data.window)
    return Outlook(
        shards=len(paths),
        remote=len(paths) - len(local),
        missing=len([path for path in local if not path.exists()]),
        samples=samples,
        bytes=size if known else None,
        steps=steps,
        epochs=steps * recipe.train.batch_size / samples if steps and samples else recipe.train.epochs,
        shards_per_rank=len(paths) / world,
        open_shards=drawn,
        working_set=drawn * size // len(known) if known else None,
    )


def _counted(paths: list[Path]) -> Iterator[tuple[int, int] | None]:
    """Yield (samples, bytes) of local shards, or None where neither dataset.json nor an index tells."""
    listed: dict[Path, dict[str, Listed]] = {}
    for path in paths:
        if path.parent not in listed:
            listed[path.parent] = format.listed_in(path.parent)
        entry = listed[path.parent].get(path.name)
        if entry:
            yield entry[:2]
        elif path.exists() and format.index_path(path).exists():
            data = format.index_path(path).read_bytes()
            yield data.count(b"\n") - 1, path.stat().st_size
        else:
            yield None


def text_length(recipe: Recipe, words: Tokenizer) -> int | None:
    """Return the longest of some texts of the first local shard, as batches are as long as their longest; None: unread.

    Raises:
        ConfigError: a reader that cannot be built.
    """
    data = recipe.data
    first, reader = (data.shards, data.reader) if data.shards else (data.blend[0].shards, data.blend[0].reader)
    beside = data.beside if data.shards else data.beside.of(data.blend[0])
    path = expand(first, data)[0]
    if not isinstance(path, Path) or not format.index_path(path).exists():
        return None
    try:
        source = sources.one(str(path), reader or data.reader, seed=recipe.run.seed, access=data, beside=beside)
        composer, side = recipes.build_composer(recipe.model, words), recipe.model.look.size
        return max(_lengths(source, source.store, composer, side), default=None)
    except ShardError:
        return None


def _lengths(source: Source, store: Store, composer: recipes.Composer, side: int) -> Iterator[int]:
    for member in range(min(CAPTIONS, store.catalog.sizes[0])):
        try:
            example = source.example(store.read(Place(0, member, 0, member)), side)
            yield len(composer.row(example, []).ids)
        except BadSample:
            continue


def seconds(look: Outlook, *, batch_size: int, pairs_per_s: float | None) -> float | None:
    """Return how long training takes at a rate of all ranks together, saves and evals left out."""
    return look.steps * batch_size / pairs_per_s if look.steps and pairs_per_s else None


def rate(flops: float, peak: float | None, *, world: int, cpu: bool) -> float | None:
    """Return the pairs a second of all ranks that a usual share of the peak gives."""
    return PEAK_SHARE["cpu" if cpu else "cuda"] * peak * world / flops if peak and flops else None

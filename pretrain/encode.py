"""Write what a model says about each sample of shards as a parquet: features of picture and text, scores, or codes.

    python pretrain/encode.py MODEL SHARDS --features OUT.parquet
    python pretrain/encode.py MODEL SHARDS --scores OUT.parquet
    python pretrain/encode.py CODEBOOK SHARDS --codes OUT.parquet [--size 256] [--middle]

One row a sample, named by `shard` (base name) and `key`; pretrain/data/feature_table.py says which columns. Of several
captions a sample's text feature is the normalised mean, its score the mean of their cosines (`score_max`: the best).
Codes are those of an image tokenizer (pretrain/codebook.py) for the picture, squashed to a square, or for its middle.
Under deepspeed or torchrun the ranks share the shards, and the file is the same for any number of them (of equally many
threads, OMP_NUM_THREADS). Interrupted, the same command goes on after the shards that are done. How shards are read,
data.KEY=VALUE says as for training: cache_dir, cache_gb, range_reads, retry_seconds, max_pixels, allow_pipe.

Shapes: N = samples of a batch, T = their captions end to end, E = joint embedding width.
"""

import hashlib
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pretrain import command, dist, pretrained
from pretrain.batch import Batch, Example
from pretrain.codebook import Coder
from pretrain.config import ConfigError, build, override
from pretrain.data import index, loader
from pretrain.data.format import ShardError
from pretrain.data.readers import base as readers
from pretrain.data.remote import Access
from pretrain.engine import process
from pretrain.models.vlm import Encodings
from pretrain.pretrained import Pretrained

EXAMPLE = """examples:
  python pretrain/encode.py runs/clip_iconcaps 'data/iconcaps/train-{00000..00011}.tar' --features features.parquet
  torchrun --nproc_per_node 2 pretrain/encode.py exports/hf data/mine/train-*.tar --scores scores.parquet
  python pretrain/encode.py codebooks/photos 'data/photos/train-{00000..00011}.tar' --middle --codes codes.parquet
  python pretrain/encode.py exports/hf 's3://bucket/{00..99}.tar' data.cache_gb=20 --features features.parquet
  python pretrain/encode.py exports/hf coco.tar --reader '{caption: {text: ["json:captions"]}}' --scores coco.parquet"""
KEY = re.compile(r"data\.\w+=")
PATIENCE = timedelta(days=1)  # at the end the ranks wait for the slowest, however unequal their shards are


class Job(NamedTuple):
    """What is asked for."""

    model: str
    shards: list[str]
    out: Path
    what: Literal["features", "scores", "codes"]
    reader: dict[str, dict[str, Any]]
    sides: tuple[str, ...] = ("image", "text")  #: which features
    batch_size: int = 64
    workers: int = 2
    access: Access = Access()
    size: int = 256  #: pixels a side of the pictures that codes are of
    middle: bool = False  #: codes of the middle half of each side only


def encode(job: Job) -> str:
    """Write the table; return a sentence about it. All ranks call it.

    Raises:
        ConfigError: a model, reader or set of shards that cannot be used together.
        ShardError: a shard that cannot be used.
    """
    table_file = _table_file()
    if not job.out.resolve().parent.is_dir():
        raise ConfigError(f"{job.out}: there is no folder {job.out.resolve().parent}; make it first")
    device = process.setup_process_group(timeout=PATIENCE)
    model: Pretrained | Coder = (
        Coder(job.model, size=job.size, middle=job.middle, device=device)
        if job.what == "codes"
        else _two_towers(pretrained.load(job.model, device=device))
    )
    catalog = index.resolve(job.shards, job.access)
    names = base_names(catalog)
    words = dist.broadcast_object(identities(catalog) if dist.is_main() else None)
    table = table_file.FeatureTable(job.out, about=about(job, model), identities=dict(zip(names, words)))
    missing: list[int] | None = dist.broadcast_object(table.missing() if dist.is_main() else None)
    if missing is None:
        return f"{job.out} is finished already"
    began, mine = time.monotonic(), missing[dist.rank() :: dist.world()]
    total = sum(catalog.sizes[number] for number in mine)
    with tqdm(total=total, desc=f"{job.what} of rank 0", unit="sample", disable=not dist.is_main()) as bar:
        for number in mine:
            path = catalog.paths[number]
            columns, bad = _shard(job, model, catalog.only(number), device, bar)
            if len(columns["key"]) + len(bad) != catalog.sizes[number]:
                raise ShardError(f"shard {path}: changed while it was read; start the same command again")
            table.write_part(number, columns, bad)
    dist.barrier()
    if not dist.is_main():
        return ""
    rows, lost = table.merge()
    rate = sum(catalog.sizes[number] for number in missing) / max(1e-3, time.monotonic() - began)
    said = f", {lost} that cannot be used are listed in {table.bad.name}" if lost else ""
    return f"{job.out}: {rows} samples of {len(catalog.sizes)} shards{said} ({rate:.0f} samples/s)"


def _two_towers(model: Pretrained) -> Pretrained:
    if "image" not in model.model.provides:
        raise ConfigError(
            f"model {model.source}: it is a {model.config.name}, which has no features that rows are compared by; "
            "give a model of two towers"
        )
    return model


def _table_file() -> Any:
    try:
        from pretrain.data import feature_table
    except ImportError as error:
        raise ConfigError(f"encode writes parquet ({error}); pip install 'diptych[tools]'") from None
    return feature_table


def about(job: Job, model: Pretrained | Coder) -> dict[str, Any]:
    """Return what the file says of where its rows come from: all that changes them."""
    pixels = {"max_pixels": job.access.max_pixels} if job.access.max_pixels != Access().max_pixels else {}
    if isinstance(model, Coder):
        return {"version": 1, "what": job.what, **model.about(), "reader": job.reader, **pixels}
    v = model.config.vision
    return {
        "version": 1,
        "what": job.what,
        "weights": model.weights_hash,
        "transform": {"size": v.image_size, "mean": list(v.mean), "std": list(v.std), "interpolation": v.interpolation},
        "tokenizer": model.tokenizer.fingerprint,
        "context_length": model.config.text.context_length,
        "reader": job.reader,
        "columns": list(_no_rows(job, 1)),
        "batch_size": job.batch_size,  # sums in another order differ in the last bit
        **pixels,
    }


def base_names(catalog: index.Catalog) -> list[str]:
    """Return what rows call each shard.

    Raises:
        ConfigError: two shards of one base name, which rows could not tell apart.
    """
    names = [path.name for path in catalog.paths]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"SHARDS: two are called {name}; rows are named by base name and key, encode them apart")
        seen.add(name)
    return names


def identities(catalog: index.Catalog) -> list[str]:
    """Return for each shard a word that changes when the shard does: a hash of its index."""
    numbers = tqdm(range(len(catalog.paths)), desc="reading shard indexes", unit="shard", delay=3)
    return [hashlib.blake2b(catalog.index(number), digest_size=8).hexdigest() for number in numbers]


def _shard(
    job: Job, model: Pretrained | Coder, shard: index.Catalog, device: torch.device, bar: Any
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the columns of one shard's rows, and the samples that cannot be used."""
    keys: list[str] = []
    parts = [_no_rows(job, model.length if isinstance(model, Coder) else model.config.embed_dim)]
    bad: list[dict[str, str]] = []
    [path] = shard.paths
    batches = loader.scan(
        shard,
        reader=_keeping_all(job.reader),
        transform=model.transform,
        composer=model.composer,
        batch_size=job.batch_size,
        workers=job.workers,
        filled=False,
        access=job.access,
    )
    for batch in batches:
        if len(batch):
            keys += batch.keys
            parts.append(_columns(job, model, batch.to(device)))
        bad += [{**line, "shard": path.name} for line in batch.bad]
        bar.update(len(batch) + len(batch.bad))
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return {"key": keys, **columns}, bad


def _keeping_all(reader: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the reader so that the captions of a sample are all in its meta, where it knows several."""
    return {name: {**options, "keep_all": True} if name == "caption" else options for name, options in reader.items()}


def _no_rows(job: Job, width: int) -> dict[str, Tensor]:
    """Return the table's columns without a row."""
    if job.what == "codes":
        return {"codes": torch.empty(0, width, dtype=torch.uint16)}
    if job.what == "features":
        return {side: torch.empty(0, width, dtype=torch.float16) for side in job.sides}
    return {"score": torch.empty(0), "score_max": torch.empty(0), "captions": torch.empty(0, dtype=torch.int32)}


@torch.no_grad()
def _columns(job: Job, model: Pretrained | Coder, batch: Batch) -> dict[str, Tensor]:
    """Return the table's columns for a batch that is on the model's device."""
    owner_N = batch.owner_N
    single = owner_N is not None and owner_N.tolist() == list(range(len(batch)))
    if not single and (job.what != "features" or "image" in job.sides):
        raise ConfigError(f"--reader {next(iter(job.reader))}: gives samples without exactly one picture")
    if isinstance(model, Coder):
        assert batch.image_NCHW is not None
        return model.columns(batch.image_NCHW)
    seen = model.model(batch)
    out = {}
    if job.what == "scores" or "image" in job.sides:
        out["image"] = image_NE = seen.image.float().cpu()
    if job.what == "scores" or "text" in job.sides:
        text_TE, counts = _texts(job, model, batch, seen)
        out["text"] = F.normalize(torch.stack([own_TE.mean(0) for own_TE in text_TE.split(counts)]), dim=-1)
    if job.what == "features":
        return {side: out[side].half() for side in job.sides}
    cosine_T = (image_NE.repeat_interleave(torch.tensor(counts), 0) * text_TE).sum(-1)
    own = cosine_T.split(counts)
    return {
        "score": torch.stack([cosines.mean() for cosines in own]),
        "score_max": torch.stack([cosines.max() for cosines in own]),
        "captions": torch.tensor(counts, dtype=torch.int32),
    }


def _texts(job: Job, model: Pretrained, batch: Batch, seen: Encodings) -> tuple[Tensor, list[int]]:
    """Return unit-norm features of all captions of a batch, [T, E], and how many each sample has."""
    if "caption" not in job.reader:
        return seen.text.float().cpu(), [1] * len(batch)
    captions = [meta["captions"] for meta in batch.meta]
    rows = [model.composer.row(Example(key="", images=[], suffix=line), []) for own in captions for line in own]
    parts = []
    for start in range(0, len(rows), job.batch_size):
        texts = model.composer.collate(rows[start : start + job.batch_size])
        parts.append(model.model(texts.to(model.model.logit_scale.device)).text.float().cpu())
    return torch.cat(parts), [len(own) for own in captions]


def read_reader(text: str) -> dict[str, dict[str, Any]]:
    """Return `--reader` as `data.reader` would hold it: a bare name, or YAML as in a config.

    Raises:
        ConfigError: not YAML, or not a known reader with known options.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--reader {text!r}: not YAML ({error})") from None
    tree = {tree: {}} if isinstance(tree, str) else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"--reader {text!r}: write a name, or as in a config {{caption: {{text: [txt]}}}}")
    readers.make(tree)
    return {name: options or {} for name, options in tree.items()}


def main(words: list[str] | None = None) -> int:
    """Encode as the command line says; return the exit code."""
    words = sys.argv[1:] if words is None else words
    given = [word for word in words if KEY.match(word)]
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, checkpoint, export, CLIP folder; codes: a codebook's"
    )
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="as data.shards: paths with braces")
    parser.add_argument("out", metavar="OUT.parquet", type=Path, help="one row a sample, by shard and key")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--features", dest="what", action="store_const", const="features", help="float16, unit norm")
    what.add_argument("--scores", dest="what", action="store_const", const="scores", help="cosines of picture and text")
    what.add_argument("--codes", dest="what", action="store_const", const="codes", help="uint16, in raster order")
    parser.add_argument("--size", type=int, help="pixels a side of the pictures that codes are of (default: 256)")
    parser.add_argument("--middle", action="store_true", help="codes of the middle half of each side, for infilling")
    parser.add_argument("--only", choices=("image", "text"), help="features of one side only")
    parser.add_argument("--reader", metavar="YAML", help="as data.reader; default: caption, and picture for codes")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time on each rank")
    parser.add_argument("--workers", type=int, default=2, help="processes a rank that decode; 0: none")
    args = parser.parse_intermixed_args([word for word in words if word not in given])
    if args.out.suffix != ".parquet":  # or a forgotten OUT would overwrite the last shard
        parser.error(f"OUT must end in .parquet, got {args.out}")
    if args.only and args.what != "features":
        parser.error("--only is for --features; a score needs both sides, and codes are of pictures")
    if (args.size or args.middle) and args.what != "codes":
        parser.error("--size and --middle are for --codes; a model says itself how large its pictures are")
    reader = args.reader or ("picture" if args.what == "codes" else "caption")
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size must be at least 1 and --workers at least 0")

    def run() -> int:
        access = build(Access, override({}, given).get("data", {}), where="data")
        job = Job(args.model, args.shards, args.out, args.what, read_reader(reader), access=access)
        job = job._replace(size=args.size or job.size, middle=args.middle)
        sides = (args.only,) if args.only else job.sides
        said = encode(job._replace(sides=sides, batch_size=args.batch_size, workers=args.workers))
        if dist.is_main():
            print(said)
        return 0

    try:
        return command.guarded(run)
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the shards that are done", file=sys.stderr)
        return 130


if __name__ == "__main__":
    process.leave(main())

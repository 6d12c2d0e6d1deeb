"""The feature cache: what a frozen image tower says of a picture, kept by the picture's bytes, shared by runs.

    CACHE/features/MODEL/KIND/PART.safetensors      digest_N int64: of the encoded picture; rows_ND float32

MODEL is a hash of the weights and of the way from bytes to pixels, KIND `image` (unit norm, [N, E]) or `pooled` (before
the projection, [N, C]). As a row belongs to the bytes of a picture, runs of other shots, seeds, splits and methods find
it wherever the data lies. Parts are written whole or not at all and never changed: any number of runs may write at
once, an interrupted one goes on behind its last part, and the folder may be removed at any time.
Shapes: N = pictures, E = joint width, C = trunk width, D = either.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from pretrain import dist
from pretrain.batch import Batch
from pretrain.data import depot, loader
from pretrain.data.decode import IMAGES
from pretrain.data.format import write_atomic
from pretrain.data.order import Place
from pretrain.data.pipeline import Steps, evaluation_batch
from pretrain.data.remote import Access
from pretrain.pretrained import Pretrained

VERSION = 1  #: of how a row is computed
#: of a tower's section: how it trains, or where its weights were
TRAINING = {"weights", "frozen", "unlocked_blocks", "checkpointing", "patch_dropout"}
PART = 1024  #: pictures of a part; so many are encoded again after a kill
log = logging.getLogger("diptych")


def digest(fields: dict[str, bytes]) -> int | None:
    """Return a 63-bit hash of the picture among a sample's members, None where there is none."""
    name = next((name for name in IMAGES if name in fields), None)
    if name is None:
        return None
    return int.from_bytes(hashlib.blake2b(fields[name], digest_size=8).digest(), "little") >> 1


def model_key(base: Pretrained, access: Access) -> str:
    """Return what names the rows of a model: a hash of its weights, of its tower and of how it sees a picture.

    Weights alone do not say which activation stands between them, nor how many heads share them.
    """
    tower = base.config.vision.model_dump(mode="json", exclude=TRAINING)
    words = json.dumps([VERSION, base.weights_hash, tower, base.transform.resize_mode, access.max_pixels])
    return hashlib.blake2b(words.encode(), digest_size=12).hexdigest()


class Cache:
    """The rows of one model and kind."""

    def __init__(self, access: Access, base: Pretrained, kind: str) -> None:
        self.folder = depot.folder(access).with_name("features") / model_key(base, access) / kind

    def missing(self, digests: Sequence[int]) -> set[int]:
        """Return the digests that no part has."""
        wanted = set(digests)
        for path in self._parts():
            wanted -= set(self._read(path, "digest_N").tolist())
        return wanted

    def rows(self, digest_N: NDArray[np.int64], width: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return the rows of pictures, [N, D], and which of them are there."""
        out_ND, known_N = torch.zeros(len(digest_N), width), np.zeros(len(digest_N), dtype=bool)
        for path in self._parts():
            have_P = self._read(path, "digest_N").numpy()
            order_P = np.argsort(have_P, kind="stable")
            at_N = np.searchsorted(have_P[order_P], digest_N)
            at_N = order_P[np.minimum(at_N, len(have_P) - 1)] if len(have_P) else at_N
            hit_N = (have_P[at_N] == digest_N) & ~known_N if len(have_P) else np.zeros_like(known_N)
            if hit_N.any():
                out_ND[torch.from_numpy(hit_N)] = self._read(path, "rows_ND")[torch.from_numpy(at_N[hit_N])]
                known_N |= hit_N
        return out_ND, known_N

    def everywhere(self, digest_N: NDArray[np.int64], width: int, *, but: set[int]) -> Tensor:
        """Return the rows of pictures on every rank, [N, D], also where each node has a cache of its own.

        All ranks call it. Rows of the digests in `but`, whose pictures cannot be used, are zeros.
        """
        out_ND, known_N = self.rows(digest_N, width)
        lost = {int(d) for d in digest_N[~known_N]} - but
        asked = sorted(set().union(*dist.gather_objects(lost)))
        if asked:
            own_ND, has_N = self.rows(np.array(asked, dtype=np.int64), width)
            given = {d: row_D for part in dist.gather_objects({d: own_ND[n] for n, d in enumerate(asked) if has_N[n]})
                     for d, row_D in part.items()}  # fmt: skip
            assert given.keys() == set(asked), "rows of the feature cache were removed while a run read them"
            for n in np.flatnonzero(~known_N):
                if int(digest_N[n]) in given:
                    out_ND[n] = given[int(digest_N[n])]
        return out_ND

    def add(self, digests: Sequence[int], rows_ND: Tensor) -> None:
        """Keep rows as one part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digest_N = torch.tensor(digests, dtype=torch.int64)
        name = hashlib.blake2b(digest_N.numpy().tobytes(), digest_size=8).hexdigest()
        data = save({"digest_N": digest_N, "rows_ND": rows_ND.float().contiguous()})
        write_atomic(self.folder / f"{name}.safetensors", data)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @staticmethod
    def _read(path: Path, name: str) -> Tensor:
        try:
            with safe_open(str(path), framework="pt") as file:
                found: Tensor = file.get_tensor(name)
                return found
        except (OSError, SafetensorError) as error:
            log.warning("feature cache: %s cannot be read (%s); what it held is computed again", path, error)
            return torch.empty(0, dtype=torch.int64)


class _Pictures(Dataset[Batch]):
    """Number -> samples by place, those that cannot be used left out and listed."""

    def __init__(self, steps: Steps, places: list[list[Place]]) -> None:
        self.steps, self.places = steps, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Batch:
        return evaluation_batch(self.places[number], None, self.steps, _no_spare)


def _no_spare() -> Any:
    raise AssertionError("nothing is filled up")


def encode(
    steps: Steps,
    places: dict[int, Place],
    *,
    base: Pretrained,
    caches: dict[str, Cache],
    batch_size: int,
    workers: int,
    device: torch.device,
) -> dict[int, str]:
    """Encode the pictures that a cache lacks, this rank its share of them. All ranks call it.

    `places` says where a picture lies, by its digest; equal on all ranks.

    Returns:
        Why pictures cannot be used, by digest, of all ranks.
    """
    lacking = {d for cache in caches.values() for d in cache.missing(list(places))} if dist.is_main() else set()
    names = dist.broadcast_object(sorted(lacking))
    if not names:
        return {}
    mine, bad = names[dist.rank() :: dist.world()], {}
    model = base.model.to(device).eval()
    with tqdm(total=len(mine), desc="encoding pictures", unit="picture", delay=3, disable=not dist.is_main()) as bar:
        for first in range(0, len(mine), PART):
            part = mine[first : first + PART]
            cuts = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
            own = _Pictures(steps, [[places[d] for d in cut] for cut in cuts])
            found: dict[str, list[Tensor]] = {kind: [] for kind in caches}
            kept: list[int] = []
            for cut, batch in zip(cuts, loader.plainly(loader.worker_batches(own, workers, sampler=range(len(own))))):
                wrong = {(line["shard"], line["key"]): line["reason"] for line in batch.bad}
                named = {d: _name(steps, places[d]) for d in cut}
                bad |= {d: wrong[name] for d, name in named.items() if name in wrong}
                kept += [d for d, name in named.items() if name not in wrong]
                if len(batch):
                    for kind, rows_ND in _rows(model, batch.to(device), list(caches), batch_size).items():
                        found[kind].append(rows_ND)
                bar.update(len(cut))
            for kind, rows in found.items():
                if rows:
                    caches[kind].add(kept, torch.cat(rows))
    return {d: why for part in dist.gather_objects(bad) for d, why in part.items()}


def _name(steps: Steps, place: Place) -> tuple[str, str]:
    store = steps.sources[0].store
    return str(store.catalog.paths[place.shard]), store.key(place)


@torch.no_grad()
def _rows(model: Any, batch: Batch, kinds: list[str], batch_size: int) -> dict[str, Tensor]:
    """Return the rows of a batch by kind; it is filled up, so that a row's bits do not depend on what else was lacking.

    Products of few rows are summed in another order than those of many.
    """
    assert batch.image_NCHW is not None
    full = [*range(len(batch)), *[len(batch) - 1] * (batch_size - len(batch))]
    seen = model(Batch(keys=[""] * len(full), image_NCHW=batch.image_NCHW[full]))
    return {kind: getattr(seen, kind)[: len(batch)].float().cpu() for kind in kinds}

"""Look at every sample of some shards and count what a training run would stumble over."""

from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data_tools import _inputs
from data_tools._captions import captions_of
from data_tools._header import read_header
from pretrain.data import format as shards
from pretrain.data.decode import IMAGES, BadSample, decode_image

EXAMPLES = 3
MANY = 10  # rows of the list of repeated captions
REMEMBERED = 1_000_000  # different captions whose repeats are counted; more would cost too much memory


class Audit:
    """Collects over shards; `report` sums up."""

    def __init__(self, *, decode: bool) -> None:
        self.decode = decode
        self.shards = self.bytes = self.samples = self.bad = 0
        self.unusable: list[str] = []  #: sentences about whole shards: a run would refuse to start
        self.problems: dict[str, list[Any]] = {}  #: kind -> [count, examples]
        self.notes: dict[str, list[Any]] = {}
        self.sides: Counter[int] = Counter()
        self.words: Counter[int] = Counter()
        self.captions: Counter[str] = Counter()
        self._keys: set[bytes] = set()

    def shard(self, path: Path) -> None:
        """Take one shard into account."""
        self.shards += 1
        try:
            entries = shards.scan(path)
            self.bytes += path.stat().st_size
            self._index(path, entries)
            for key, members in _inputs.samples(path, entries):
                self._sample(f"{path.name}/{key}", key, members)
        except shards.ShardError as error:
            self.unusable.append(str(error))

    def report(self, *, max_bad_fraction: float) -> dict[str, Any]:
        """Return all counts; `reasons` says why the set cannot be trained on, and is empty if it can."""
        reasons = list(self.unusable)
        if self.samples == self.bad:
            reasons.append("no usable sample")
        elif self.bad > max_bad_fraction * self.samples:
            reasons.append(f"{self.bad} of {self.samples} samples are bad, over max-bad-fraction {max_bad_fraction}")
        repeats = [(caption, count) for caption, count in self.captions.most_common(MANY) if count > 1]
        return {
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "bad": self.bad,
            "problems": {kind: {"count": n, "examples": some} for kind, (n, some) in self.problems.items()},
            "notes": {kind: {"count": n, "examples": some} for kind, (n, some) in self.notes.items()},
            "histograms": {
                "shorter side of the image (pixels)": histogram(self.sides),
                "words a caption": histogram(self.words),
            },
            "different_captions": len(self.captions),
            "repeated_captions": repeats,
            "reasons": reasons,
        }

    def _index(self, path: Path, entries: list[shards.Entry]) -> None:
        listed = shards.read_manifest(path.parent)["shards"].get(path.name)
        if listed is not None and (listed["samples"], listed["bytes"]) != (len(entries), path.stat().st_size):
            self.unusable.append(
                f"shard {path}: {len(entries)} samples in {path.stat().st_size} bytes, dataset.json says "
                f"{listed['samples']} in {listed['bytes']}; run `python -m data_tools index {path}`"
            )
        try:
            if shards.read_index(path) != entries:
                self.unusable.append(f"index of {path}: differs from the tar; run `python -m data_tools index {path}`")
        except FileNotFoundError:
            _count(self.notes, "shard without index (made on first use)", path.name)

    def _sample(self, where: str, key: str, members: Mapping[str, bytes]) -> None:
        self.samples += 1
        mark = blake2b(key.encode(), digest_size=8).digest()  # 8 bytes instead of a name: shards may be many
        if mark in self._keys:
            _count(self.notes, "key that another sample has too", where)
        self._keys.add(mark)
        good = [self._good(where, look, members) for look in (self._image, self._caption)]
        self.bad += not all(good)

    def _good(self, where: str, look: Any, members: Mapping[str, bytes]) -> bool:
        try:
            look(members)
        except BadSample as error:
            kind, _, detail = str(error).partition(" (")
            _count(self.problems, kind.partition(":")[0], f"{where} ({detail}" if detail else where)
            return False
        return True

    def _image(self, members: Mapping[str, bytes]) -> None:
        name = next((name for name in IMAGES if name in members), None)
        if name is None:
            raise BadSample("no image member")
        _, width, height = read_header(members[name])
        if self.decode:
            decode_image(members[name])
        self.sides[min(width, height)] += 1

    def _caption(self, members: Mapping[str, bytes]) -> None:
        captions = captions_of(members)
        for caption in captions:
            self.words[len(caption.split())] += 1
        if captions[0] in self.captions or len(self.captions) < REMEMBERED:
            self.captions[captions[0]] += 1


def histogram(counts: Counter[int]) -> list[tuple[str, int]]:
    """Return (label, count) of bins whose edges double: 1, 2-3, 4-7, 8-15, ..."""
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value.bit_length()] += count
    edges = range(min(bins), max(bins) + 1) if bins else ()
    return [(f"{2 ** (bit - 1)}-{2**bit - 1}" if bit > 1 else str(bit), bins[bit]) for bit in edges]


def _count(table: dict[str, list[Any]], kind: str, example: str) -> None:
    row = table.setdefault(kind, [0, []])
    row[0] += 1
    if len(row[1]) < EXAMPLES:
        row[1].append(example)

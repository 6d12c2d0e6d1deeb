"""Look at every sample of some shards and count what a training run would stumble over.

`look` is what a worker does with one shard; `Audit` sums up over shards.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools import _duplicates, _pack, _phash, _tar
from data_tools._repeats import Repeats
from pretrain.data import format as shards
from pretrain.data import headers
from pretrain.data.decode import BadSample, decode_image

VERSION = 2  # of what `look` returns: results of another version are not taken from an interrupted run
EXAMPLES = 3
NEAR = 4  # bits in which the hashes of near-duplicates differ at most


class Look(NamedTuple):
    """What a worker is told."""

    path: Path
    decode: bool = False
    tokenizer: str | None = None
    near: bool = False


def look(asked: Look) -> bytes:
    """Return what there is to say about one shard."""
    seen = _Seen(asked)
    try:
        entries = headers.scan(asked.path)
        seen.size = asked.path.stat().st_size
        seen.compare(entries)
        if not entries:
            seen.unusable.append(f"shard {asked.path}: holds no samples; build it again or leave it out")
        with _tar.opened(asked.path) as tar:
            for entry in entries:
                seen.sample(tar, entry)
    except shards.ShardError as error:
        seen.unusable.append(str(error))
    return seen.packed()


class _Seen:
    """Collects over the samples of one shard."""

    def __init__(self, asked: Look) -> None:
        self.asked = asked
        self.size = self.bad = 0
        self.unusable: list[str] = []  #: sentences about the whole shard: a run would refuse to start
        self.problems: dict[str, list[Any]] = {}  #: kind -> [count, examples]
        self.notes: dict[str, list[Any]] = {}
        self.counts: dict[str, Counter[int]] = {"sides": Counter(), "words": Counter(), "tokens": Counter()}
        self.keys: list[int] = []
        self.captions: list[int] = []
        self.looks: list[int] = []
        self.colours: list[int] = []
        self.texts: list[str] = []

    def compare(self, entries: list[shards.Entry]) -> None:
        """Hold the tar against dataset.json and its index."""
        path = self.asked.path
        samples, size, sha256 = shards.listed_in(path.parent).get(path.name, (len(entries), self.size, ""))
        if (samples, size) != (len(entries), self.size):
            self.unusable.append(
                f"shard {path}: {len(entries)} samples in {self.size} bytes, dataset.json says "
                f"{samples} in {size}; run `python -m data_tools index {path}`"
            )
        elif self.asked.decode and sha256 and shards.sha256_of(path) != sha256:
            self.unusable.append(
                f"shard {path}: its SHA-256 is not the one in dataset.json, so nobody could download it; fetch or "
                f"build it again, or run `python -m data_tools index {path}` if the change is meant"
            )
        try:
            if shards.read_index(path) != entries:
                self.unusable.append(f"index of {path}: differs from the tar; run `python -m data_tools index {path}`")
        except FileNotFoundError:
            count(self.notes, "shard without index (made on first use)", path.name)

    def sample(self, tar: _tar.Tar, entry: shards.Entry) -> None:
        """Take one sample into account."""
        self.keys.append(mark(entry.key))
        where = f"{self.asked.path.name}/{entry.key}"
        good = [self._good(where, look, tar, entry) for look in (self._image, self._caption)]
        self.bad += not all(good)
        for kept in (self.captions, self.looks, self.colours):
            kept.extend([0] * (len(self.keys) - len(kept)))

    def packed(self) -> bytes:
        """Return all of it for the driver."""
        self._count_tokens()
        tree = {
            "samples": len(self.keys),
            "bytes": self.size,
            "bad": self.bad,
            "unusable": self.unusable,
            "problems": self.problems,
            "notes": self.notes,
            "counts": {name: sorted(found.items()) for name, found in self.counts.items()},
        }
        arrays = {"keys": self.keys, "captions": self.captions, "looks": self.looks, "colours": self.colours}
        return _pack.pack(tree, **{name: np.array(values, np.uint64) for name, values in arrays.items()})

    def _good(self, where: str, look: Any, tar: _tar.Tar, entry: shards.Entry) -> bool:
        try:
            look(tar, entry)
        except BadSample as error:
            kind, _, detail = str(error).partition(" (")
            count(self.problems, kind.partition(":")[0], f"{where} ({detail}" if detail else where)
            return False
        return True

    def _image(self, tar: _tar.Tar, entry: shards.Entry) -> None:
        picture = tar.picture(entry)
        if self.asked.decode:
            decode_image(tar.image(entry))
        if self.asked.near:
            look = _phash.look(tar.image(entry))
            self.looks.append(look.hash if look else 0)
            self.colours.append(look.colour if look else 0)
        self.counts["sides"][min(picture.width, picture.height)] += 1

    def _caption(self, tar: _tar.Tar, entry: shards.Entry) -> None:
        captions = tar.captions(entry)
        for caption in captions:
            self.counts["words"][len(caption.split())] += 1
        self.captions.append(mark(captions[0]))
        if self.asked.tokenizer is not None:
            self.texts.extend(captions)

    def _count_tokens(self) -> None:
        if self.texts and self.asked.tokenizer is not None:
            self.counts["tokens"].update(token_counts(self.asked.tokenizer, self.texts))


def token_counts(name: str, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has, start and end included."""
    return [len(row) for row in _tokenizer(name).encode_batch(texts, 1_000_000)]


@functools.cache
def _tokenizer(name: str) -> Any:
    from pretrain.data import tokenizer  # imported late: it takes a second that most runs need not wait for

    return tokenizer.load(name)


class Audit:
    """Collects over shards, in their order; `report` sums up."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.tree: dict[str, Any] = {"shards": 0, "samples": 0, "bytes": 0, "bad": 0}
        self.unusable: list[str] = []
        self.problems: dict[str, list[Any]] = {}
        self.notes: dict[str, list[Any]] = {}
        self.counts: dict[str, Counter[int]] = {"sides": Counter(), "words": Counter(), "tokens": Counter()}
        self.keys, self.captions = Repeats(paths), Repeats(paths)
        self.looks: list[Any] = []

    def add(self, result: bytes) -> None:
        """Take what `look` said about the next shard."""
        tree, arrays = _pack.unpack(result)
        self.tree["shards"] += 1
        for name in ("samples", "bytes", "bad"):
            self.tree[name] += tree[name]
        self.unusable += tree["unusable"]
        for own, new in ((self.problems, tree["problems"]), (self.notes, tree["notes"])):
            for kind, (number, examples) in new.items():
                count(own, kind, *examples, number=number)
        for name, rows in tree["counts"].items():
            self.counts[name].update({int(value): number for value, number in rows})
        self.keys.add(arrays["keys"])
        self.captions.add(arrays["captions"])
        self.looks.append(np.stack([arrays["looks"], arrays["colours"]]))

    def report(self, *, max_bad_fraction: float, context_length: int, near: bool) -> dict[str, Any]:
        """Return all counts; `reasons` says why the set cannot be trained on, and is empty if it can."""
        samples, bad = self.tree["samples"], self.tree["bad"]
        reasons = list(self.unusable)
        if samples == bad:
            reasons.append("no usable sample")
        elif bad > max_bad_fraction * samples:
            reasons.append(f"{bad} of {samples} samples are bad, over max-bad-fraction {max_bad_fraction}")
        notes = {**self.notes, **self._repeated(near=near, context_length=context_length)}
        histograms = {
            "shorter side of the image (pixels)": histogram(self.counts["sides"]),
            "words a caption": histogram(self.counts["words"]),
        }
        if self.counts["tokens"]:
            histograms["tokens a caption, start and end included"] = histogram(self.counts["tokens"])
        return {
            **self.tree,
            "problems": {kind: {"count": n, "examples": some} for kind, (n, some) in self.problems.items()},
            "notes": {kind: {"count": n, "examples": some} for kind, (n, some) in notes.items()},
            "histograms": histograms,
            "different_captions": self.captions.different,
            "repeated_captions": self.captions.texts(),
            "reasons": reasons,
        }

    def _repeated(self, *, near: bool, context_length: int) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"key that another sample has too": [*self.keys.later(EXAMPLES)]}
        if near:
            found["picture that looks like an earlier one"] = self._near_duplicates()
        long = sum(number for tokens, number in self.counts["tokens"].items() if tokens > context_length)
        found[f"caption longer than {context_length} tokens (its end is cut off)"] = [long, []]
        return {kind: row for kind, row in found.items() if row[0]}

    def _near_duplicates(self) -> list[Any]:
        """Return [count, examples] of the pictures that look like an earlier one."""
        look_N, colour_N = np.concatenate(self.looks, 1)
        alike = _duplicates.image_criterion(look_N, colour_N, NEAR)
        none, every = np.zeros(len(look_N), bool), np.ones(len(look_N), bool)
        onto_N, _ = _duplicates.decide([alike], np.arange(len(look_N)), none, every)
        later = np.flatnonzero(onto_N != _duplicates.KEPT).tolist()
        name = self.keys.name
        return [len(later), [f"{name(at)} and {name(int(onto_N[at]))}" for at in later[:EXAMPLES]]]


def mark(text: str) -> int:
    """Return 8 bytes instead of a text: shards may be many. Never 0, which stands for none."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()) or 1


def histogram(counts: Counter[int]) -> list[tuple[str, int]]:
    """Return (label, count) of bins whose edges double: 1, 2-3, 4-7, 8-15, ..."""
    bins: Counter[int] = Counter()
    for value, number in counts.items():
        bins[value.bit_length()] += number
    edges = range(min(bins), max(bins) + 1) if bins else ()
    return [(f"{2 ** (bit - 1)}-{2**bit - 1}" if bit > 1 else str(bit), bins[bit]) for bit in edges]


def count(table: dict[str, list[Any]], kind: str, *examples: str, number: int = 1) -> None:
    """Count one more of a kind, or `number` more, and keep the first few examples."""
    row = table.setdefault(kind, [0, []])
    row[0] += number
    row[1].extend(examples[: EXAMPLES - len(row[1])])

"""From the counts of all shards to the page that stats writes."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools import _pack, _page, _plot, _rows, _tar
from data_tools._repeats import Repeats
from data_tools._survey import FINE
from pretrain.data import headers
from pretrain.data.decode import BadSample

EACH = 60  # shards that get a bar of their own
BINS = 30


class Overview:
    """Sums up over shards, in their order."""

    def __init__(self, paths: Sequence[Path], pictures: int) -> None:
        self.paths, self.pictures = paths, pictures
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self.samples: list[int] = []
        self.bytes: list[int] = []
        self.captions = Repeats(paths)
        self.draws: list[tuple[int, int, int]] = []

    def add(self, result: bytes) -> None:
        """Take the counts of the next shard."""
        tree, arrays = _pack.unpack(result)
        shard = len(self.samples)
        self.samples.append(tree["samples"])
        self.bytes.append(tree["bytes"])
        self.captions.add(arrays["captions"])
        for name, rows in tree["counts"].items():
            self.counts[name].update({tuple(v) if isinstance(v, list) else v: number for v, number in rows})
        self.draws = sorted([*self.draws, *((mark, shard, row) for mark, row in tree["draws"])])[: 2 * self.pictures]

    def page(self, title: str) -> str:
        """Return the whole page."""
        total = sum(self.samples)
        repeated, _ = self.captions.later(0)
        numbers = [
            ("samples", f"{total:,}"),
            ("shards", f"{len(self.samples):,}"),
            ("on disk", size(sum(self.bytes))),
            ("different captions", f"{self.captions.different:,}"),
            ("repeat an earlier caption", f"{repeated / max(1, total):.1%}"),
            ("cannot be used", f"{sum(self.counts['bad'].values()):,}"),
        ]
        parts = [_page.tiles(numbers), self._pictures(), self._words(), self._shards(), self._samples()]
        lead = f"{total:,} pairs of image and text in {len(self.samples):,} shards"
        return _page.page(title, lead, parts, "python -m data_tools stats")

    def _pictures(self) -> str:
        sides = [(f"{2 ** (at / FINE):.0f}", n) for at, n in span(self.counts["side"])]
        shapes = [(ratio(at / FINE), n) for at, n in span(self.counts["aspect"])]
        weights = [(size(2 ** (at / FINE)), n) for at, n in span(self.counts["bytes"])]
        kinds = sorted(self.counts["kind"].items(), key=lambda row: -row[1])
        plots = [
            _page.card("Width and height", self._sizes()),
            _page.card("Shorter side", _plot.bars(sides, unit="pixels at least (logarithmic)")),
            _page.card("Shape", _plot.bars(shapes, unit="width : height")),
            _page.card("Size of the file", _plot.bars(weights, unit="at least (logarithmic)")),
            _page.card("Format", _plot.bars(kinds, unit="by the header, whatever the name says")),
        ]
        return _page.section("Pictures", f'<div class="plots">{"".join(plots)}</div>')

    def _sizes(self) -> str:
        cells = self.counts["size"]
        if not cells:
            return "none"
        low, high = ([edge(place[axis] for place in cells) for axis in (0, 1)] for edge in (min, max))
        shown = {(x - low[0], y - low[1]): n for (x, y), n in cells.items()}
        names = [[f"{2 ** (2 * at / FINE):.0f}" for at in range(low[axis], high[axis] + 1)] for axis in (0, 1)]
        return _plot.field(shown, names[0], names[1], unit=("width (pixels at least)", "height"))

    def _words(self) -> str:
        plots = [_page.card("Words a caption", _plot.bars(linear(self.counts["words"]), unit="words"))]
        if self.counts["tokens"]:
            tokens = _plot.bars(linear(self.counts["tokens"]), unit="tokens, start and end included")
            plots.append(_page.card("Tokens a caption", tokens))
        several = [(str(at), n) for at, n in span(self.counts["captions"])]
        if len(several) > 1:
            plots.append(_page.card("Captions a sample", _plot.bars(several, unit="captions")))
        plots.append(
            _page.card("How often captions come", _plot.bars(self._frequencies(), unit="samples with the same one"))
        )
        rows = self.captions.texts()
        if rows:
            often = _page.table(("caption", "samples"), [(caption[:120], n) for caption, n in rows[:6]])
            plots.append(_page.card("Captions that come most often", often))
        return _page.section("Captions", f'<div class="plots">{"".join(plots)}</div>')

    def _frequencies(self) -> list[tuple[str, int]]:
        bins: Counter[int] = Counter()
        for number, captions in self.captions.frequencies().items():
            bins[number.bit_length()] += number * captions
        return [
            (f"{2 ** (bit - 1)}-{2**bit - 1}" if bit > 1 else "1", bins[bit])
            for bit in range(1, max(bins, default=0) + 1)
        ]

    def _shards(self) -> str:
        each = len(self.samples) <= EACH
        unit = "shards in their order" if each else "number of shards by"
        plots = []
        for name, values in (("samples", self.samples), ("MB", [round(n / 1e6) for n in self.bytes])):
            rows = [(str(at), n) for at, n in enumerate(values)] if each else linear(Counter(values))
            plots.append(_page.card(f"{name} a shard", _plot.bars(rows, unit=unit if each else f"{unit} {name}")))
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for path, samples, weight in zip(self.paths, self.samples, self.bytes):
            row = sums[_rows.prefix_of(path)]
            row[:] = row[0] + 1, row[1] + samples, row[2] + weight
        splits = [(name, shards, samples, size(weight)) for name, (shards, samples, weight) in sorted(sums.items())]
        plots.append(_page.card("Splits", _page.table(("split", "shards", "samples", "on disk"), splits)))
        if self.counts["bad"]:
            bad = sorted(self.counts["bad"].items(), key=lambda row: -row[1])
            plots.append(_page.card("Cannot be used", _page.table(("why", "samples"), bad)))
        return _page.section("Shards", f'<div class="plots">{"".join(plots)}</div>')

    def _samples(self) -> str:
        figures: list[str] = []
        for _, shard, row in self.draws:
            if len(figures) == self.pictures:
                break
            path = self.paths[shard]
            entry = headers.entries_of(path)[row]
            with _tar.opened(path) as tar:
                try:
                    kind, width, height, _ = tar.picture(entry)
                    first, *others = tar.captions(entry)
                    words = first[:300] + (f" (and {len(others)} more)" if others else "")
                    told = f"{path.name} / {entry.key}, {width} x {height} {kind}"
                    figures.append(_page.picture(tar.image(entry), words, told))
                except BadSample:
                    continue  # counted above; the next draw takes its place
        note = "chosen by hash of shard and key: the same ones each time, another --seed shows others"
        return _page.section("Samples", f'<div class="pictures">{"".join(figures)}</div>', note=note)


def span(counts: Counter[int]) -> list[tuple[int, int]]:
    """Return (bin, count) of all bins from the first to the last."""
    return [(at, counts[at]) for at in range(min(counts), max(counts) + 1)] if counts else []


def linear(counts: Counter[int]) -> list[tuple[str, int]]:
    """Return (label, count) of at most BINS + 1 bins of equal width, the last of which takes the rare large values."""
    if not counts:
        return []
    total, seen, top = sum(counts.values()), 0, 0
    for top in sorted(counts):
        seen += counts[top]
        if seen >= 0.995 * total:
            break
    low = min(counts)
    steps = (scale * 10**power for power in range(12) for scale in (1, 2, 5))
    step = next(step for step in steps if (top - low) // step < BINS)
    first = low // step * step
    bins: Counter[int] = Counter()
    for value, number in counts.items():
        bins[min(value, top + step) // step * step] += number
    edges = range(first, max(bins) + 1, step)
    return [(f"{at}+" if at > top else str(at), bins[at]) for at in edges]


def ratio(exponent: float) -> str:
    """Return 2 to a power as a shape: 1:1, 1.4:1, 1:2."""
    value = 2 ** abs(exponent)
    shown = f"{value:.3g}" if value < 10 else f"{value:.0f}"
    return "1:1" if exponent == 0 else f"{shown}:1" if exponent > 0 else f"1:{shown}"


def size(number: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"

"""quarantine.jsonl: one line a skipped sample, and the fraction at which all ranks stop together."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain import dist

MINIMUM = 100  # below so many samples a fraction says little


class TooManyBad(RuntimeError):
    """More samples are unusable than data.max_bad_fraction allows."""


class Quarantine:
    """Collects `Batch.bad` of all ranks in one file. A sample is counted once an epoch, also after a resume.

    `add` is local and free. `sync` is called by all ranks at the same steps (when metrics are logged, before a save):
    one all-reduce of one number, and only when some rank has news a gather of the lines.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float, *, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called before lines are written, and may raise."""
        self.path = Path(path)
        self.check = check
        self.max_bad_fraction = max_bad_fraction
        self.by_source: Counter[str] = Counter()  #: distinct unusable samples, equal on all ranks after `sync`
        self._news: list[dict[str, str]] = []
        self._known: set[tuple[str, ...]] | None = None  # read by rank 0 at the first sync

    @property
    def count(self) -> int:
        """Return the number of distinct unusable samples of all sources, equal on all ranks after `sync`."""
        return self.by_source.total()

    def add(self, bad: list[dict[str, str]]) -> None:
        """Take the bad samples of one batch of this rank."""
        self._news.extend(bad)

    def sync(self, *, seen: int, device: torch.device | str = "cpu") -> None:
        """Write what the ranks have found and stop them all where it is too much.

        `seen` counts the samples of all ranks since step 0, equal on all ranks.

        Raises:
            TooManyBad: on every rank, in the same call.
        """
        first = self._known is None
        if first:
            self._known = self._read() if dist.is_main() else set()
        if first or dist.any_rank(bool(self._news), device=device):
            found = [line for lines in dist.gather_objects(self._news) for line in lines]
            self._news = []
            if dist.is_main():
                self._write(found)
            self.by_source = dist.broadcast_object(Counter(source for source, *_ in self._known or ()))
        if seen >= MINIMUM and self.count > self.max_bad_fraction * seen:
            of = ", ".join(f"{count} of source {name!r}" for name, count in self.by_source.most_common() if name)
            raise TooManyBad(
                f"{self.count} of {seen} samples are unusable{f' ({of})' if of else ''}, "
                f"over data.max_bad_fraction={self.max_bad_fraction}; {self.path} lists them with reasons: "
                "mend the data or raise the limit"
            )

    def _read(self) -> set[tuple[str, ...]]:
        if not self.path.exists():
            return set()
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a crash cut the last line
            self.path.write_text(whole, encoding="utf-8")
        return {_identity(json.loads(line)) for line in whole.splitlines()}

    def _write(self, found: list[dict[str, str]]) -> None:
        known = self._known
        assert known is not None
        lines = []
        for line in found:
            if _identity(line) not in known:
                known.add(_identity(line))
                lines.append(json.dumps(line) + "\n")
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                self.check()  # after it is opened: see engine/journal.py
                file.writelines(lines)


def _identity(line: dict[str, str]) -> tuple[str, ...]:
    return tuple(line.get(name, "") for name in ("source", "epoch", "shard", "key"))

"""What a run has left so far, read for its report: nothing is believed to be whole, the run may be under way."""

import contextlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """A run folder; what is missing or torn reads as empty."""

    path: Path

    def lines(self, name: str, *, last: int | None = None) -> list[dict[str, Any]]:
        """Return the objects of a JSONL file, the `last` ones if so many are asked for; torn lines are left out."""
        out = []
        with contextlib.suppress(OSError):
            rows = (self.path / name).read_text(encoding="utf-8", errors="replace").splitlines()
            for row in rows[-last:] if last else rows:
                with contextlib.suppress(ValueError):
                    found = json.loads(row)
                    if isinstance(found, dict):
                        out.append(found)
        return out

    def tree(self, name: str) -> dict[str, Any]:
        """Return a JSON file, or an empty one."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        return {}

    def text(self, name: str) -> str:
        """Return a text file, or nothing."""
        with contextlib.suppress(OSError):
            return (self.path / name).read_text(encoding="utf-8", errors="replace")
        return ""

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says, in the order of the steps."""
        return sorted((line for line in self.lines("metrics.jsonl") if "step" in line), key=lambda line: line["step"])

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of one of the metrics."""
        return [(line["step"], line[name]) for line in self.metrics if isinstance(line.get(name), int | float)]

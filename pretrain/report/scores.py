"""Scores of a run: evals.jsonl, one line a score, and the table that people read.

    python -m pretrain.report.scores runs/clip_iconcaps runs/coop

A line is {"step", "name", "value", "low", "high", "count", "unit"}; low and high bound the 95 % interval, the unit says
how the numbers are shown (metrics/interval.py; lines of older runs have none, they are shares).
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain.data.format import write_atomic
from pretrain.metrics.interval import Score, shown, sign

FILE = "evals.jsonl"


def append(
    folder: str | Path, step: int, scores: Mapping[str, Score], *, check: Callable[[], None] = lambda: None
) -> None:
    """Add the scores of a step; lines of the same names at this step or later (before a restart) are replaced.

    `check` is called before they are there, and may raise.
    """
    path = Path(folder) / FILE
    kept = [line for line in _lines(path) if not (line["name"] in scores and line["step"] >= step)]
    added = [{"step": step, "name": name, **score._asdict()} for name, score in scores.items()]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in [*kept, *added]).encode(), check=check)


def newest(folder: str | Path) -> dict[str, tuple[int, Score]]:
    """Return for each name the last step that scored it, and its score."""
    out = {}
    for line in sorted(_lines(Path(folder) / FILE), key=lambda line: line["step"]):
        score = Score(line["value"], line["low"], line["high"], line["count"], line.get("unit", "%"))
        out[line["name"]] = (line["step"], score)
    return out


def table(folders: list[Path]) -> str:
    """Return the newest scores of several runs as a table.

    Raises:
        ValueError: no run of these has a score.
    """
    rows = [
        (folder.name, name, step, score) for folder in folders for name, (step, score) in sorted(newest(folder).items())
    ]
    if not rows:
        raise ValueError(f"no scores in {', '.join(map(str, folders))}; run pretrain/evaluate.py on the run first")
    run_width, name_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{'run':<{run_width}}  {'score':<{name_width}}  {'step':>6}  {'value':>7}  95 % interval      samples"]
    lines.append("-" * len(lines[0]))
    for run, name, step, score in rows:
        interval = f"[{shown(score.low, score.unit):>5}, {shown(score.high, score.unit):>5}]"
        value = f"{shown(score.value, score.unit):>5}{sign(score.unit)}"
        lines.append(
            f"{run:<{run_width}}  {name:<{name_width}}  {step:>6}  {value:>7}  {interval:<17} {score.count:>7}"
        )
    return "\n".join(lines)


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def main(words: list[str] | None = None) -> int:
    """Print the table of some runs."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m pretrain.report.scores runs/clip_iconcaps"
    )
    parser.add_argument("run", nargs="+", type=Path, help="a run folder")
    folders = parser.parse_args(words).run
    try:
        print(table(folders))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

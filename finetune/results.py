"""The table of a sweep: `python -m finetune.results OUT` writes OUT/results.{md,csv,json,html} from the runs in OUT.

Every number is the mean over seeds with its 95 % interval (Student's t); what the literature claims is asked of the
table (finetune/claims.py). Runs that are not finished are left out. No torch is loaded: jobs of an array can afford it.
"""

import argparse
import csv
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune import claims
from finetune.claims import ZERO, Cell, Mean, Verdict, mean
from pretrain.data.format import write_atomic
from pretrain.report import page, scores

NAME = re.compile(r"(?P<label>.+)-shots(?P<shots>\d+)-seed(?P<seed>\d+)")
BASE = "base/"  #: before the scores on the test split of runs that know half of the classes only
HARMONIC = "harmonic"  #: of base and new accuracy, 2bn / (b + n)
DELTA = "delta.safetensors"
TITLES = {
    "accuracy": "Accuracy on the test split", "base/accuracy": "Accuracy on base classes, trained on these alone",
    "new/accuracy": "Accuracy on new classes",
    HARMONIC: "Harmonic mean of base and new classes", "shift/accuracy": "Accuracy under the shift",
}  # fmt: skip


def read(out: Path) -> list[Cell]:
    """Return the finished runs of a sweep.

    Raises:
        ValueError: there is none.
    """
    found = []
    for folder in sorted(path for path in out.iterdir() if path.is_dir()) if out.is_dir() else []:
        name = NAME.fullmatch(folder.name)
        if name is None or not (folder / "config.yaml").is_file() or not (folder / DELTA).is_file():
            continue
        newest = scores.newest(folder)
        if not newest:  # it is being scored
            continue
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        lead = f"{tree['task']['name']}/"
        scored = {key.removeprefix(lead): score.value for key, (_, score) in newest.items()}
        if tree["task"].get("classes") == "base":
            scored = _of_halves(scored)
        found.append(Cell(name["label"], tree["method"], int(name["shots"]), int(name["seed"]), scored))
    if not found:
        raise ValueError(f"{out}: no finished run called METHOD-shotsK-seedS there; sweep first")
    return found


def _of_halves(scored: dict[str, float]) -> dict[str, float]:
    """Return the scores of a run that learnt half of the classes under names that say so, and both halves' mean."""
    out = {key if key.startswith("new/") else BASE + key: value for key, value in scored.items()}
    base, new = scored["accuracy"], scored.get("new/accuracy")
    if new is not None:
        out[HARMONIC] = 2 * base * new / (base + new) if base + new else 0.0
    return out


def table(cells: list[Cell], score: str) -> dict[str, dict[int, Mean]]:
    """Return the mean over seeds of one score, by method and shots; zero-shot is a method."""
    zero = score.replace("accuracy", ZERO)
    values: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        if zero != score and zero in cell.scores:
            values.setdefault(("zero-shot", cell.shots), []).append(cell.scores[zero])
        if score in cell.scores:
            values.setdefault((cell.label, cell.shots), []).append(cell.scores[score])
    found: dict[str, dict[int, Mean]] = {}
    for (label, shots), x in sorted(values.items(), key=lambda item: (item[0][0] != "zero-shot", item[0])):
        exact = mean(x[:1]) if label == "zero-shot" else mean(x)  # the base is the same in every run
        found.setdefault(label, {})[shots] = exact
    return found


def score_names(cells: list[Cell]) -> list[str]:
    """Return the scores that have a table."""
    known = {name for cell in cells for name in cell.scores}
    return [name for name in TITLES if name in known]


def shown(value: Mean | None, *, scale: float = 100) -> str:
    """Return a mean as people read it: in percent, with half of its interval."""
    if value is None:
        return ""
    half = (value.high - value.low) / 2
    return f"{scale * value.value:.1f}" + (f" ± {scale * half:.1f}" if math.isfinite(half) else "")


def rows(cells: list[Cell], score: str) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of a table."""
    found = table(cells, score)
    shots = sorted({k for line in found.values() for k in line})
    head = ["method", *(f"{k} shot{'s' if k > 1 else ''}" for k in shots)]
    return head, [[label, *(shown(line.get(k)) for k in shots)] for label, line in found.items()]


def verdict(found: Verdict) -> list[str]:
    """Return a claim, what became of it, and the difference in points."""
    said = {True: "held", False: "not held", None: "not tried"}[found.held]
    one = found.difference
    interval = ""
    if one is not None:
        known = math.isfinite(one.low)
        interval = f"{100 * one.value:+.1f}" + (f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]" if known else "")
    return [found.claim, said, interval, found.why]


CLAIM_HEAD = ["claim", "", "points, 95 % interval", ""]


def markdown(cells: list[Cell], verdicts: list[Verdict]) -> str:
    """Return the tables and the claims."""

    def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]

    out = [f"# {len(cells)} runs", "", f"{_seeds(cells)}; percent, mean ± half of the 95 % interval over seeds.", ""]
    for score in score_names(cells):
        out += [f"## {TITLES[score]}", "", *lines(*rows(cells, score)), ""]
    out += ["## What the literature claims", "", *lines(CLAIM_HEAD, [verdict(v) for v in verdicts]), ""]
    return "\n".join(out)


def _seeds(cells: list[Cell]) -> str:
    seeds = sorted({cell.seed for cell in cells})
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def flat(cells: list[Cell]) -> str:
    """Return every mean as a line of a CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["score", "method", "shots", "seeds", "mean", "low", "high"])
    for score in score_names(cells):
        for label, line in table(cells, score).items():
            for shots, m in line.items():
                bounds = [f"{v:.6f}" if math.isfinite(v) else "" for v in (m.low, m.high)]
                writer.writerow([score, label, shots, m.count, f"{m.value:.6f}", *bounds])
    return out.getvalue()


def tree(cells: list[Cell], verdicts: list[Verdict]) -> dict[str, Any]:
    """Return all of it as JSON holds it; bounds that are not known are null."""

    def known(m: Mean | None) -> dict[str, Any] | None:
        return m and {k: v if math.isfinite(v) else None for k, v in m._asdict().items()}

    return {
        "tables": {
            score: {label: {str(k): known(m) for k, m in line.items()} for label, line in table(cells, score).items()}
            for score in score_names(cells)
        },
        "claims": [{**v._asdict(), "difference": known(v.difference)} for v in verdicts],
        "runs": [cell._asdict() for cell in cells],
    }


def html(cells: list[Cell], verdicts: list[Verdict], title: str) -> str:
    """Return a self-contained page: curves over shots, tables, claims."""
    parts = []
    for score in score_names(cells):
        found = table(cells, score)
        lines = {label: [(float(k), 100 * m.value) for k, m in line.items()] for label, line in found.items()}
        picture = page.card("percent over shots", page.curves(lines, unit="shots"))
        numbers = page.card("mean ± half of the 95 % interval over seeds", page.table(*rows(cells, score)))
        body = page.grid([picture, numbers])
        parts.append(page.section(TITLES[score], body))
    parts.append(page.section("What the literature claims", page.table(CLAIM_HEAD, [verdict(v) for v in verdicts])))
    return page.page(title, f"{len(cells)} runs, {_seeds(cells)}", parts)


def write(out: Path) -> str:
    """Write the results of a sweep and return them as markdown.

    Raises:
        ValueError: no finished run.
    """
    found = read(out)
    verdicts = claims.judge(found)
    said = markdown(found, verdicts)
    files = {"md": said, "csv": flat(found), "json": json.dumps(tree(found, verdicts), indent=1) + "\n"}
    files["html"] = html(found, verdicts, out.resolve().name)
    for suffix, text in files.items():
        write_atomic(out / f"results.{suffix}", text.encode())
    return said


def main(words: list[str] | None = None) -> int:
    """Write and print the results of a sweep."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.results",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m finetune.results sweeps/few_shot",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the sweep's folder")
    try:
        print(write(parser.parse_args(words).out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What the few-shot literature says of its methods, asked of a table of results.

Differences are between runs of equal shots and seed. A claim holds where the mean difference is above zero at every
number of shots that it speaks of; its interval, over seeds, is that of the difference averaged over these shots.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

ZERO = "zero_shot"
#: 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; then the normal distribution's
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Mean(NamedTuple):
    """A mean with its 95 % interval; of one value the interval is not known."""

    value: float
    low: float
    high: float
    count: int


def mean(values: Iterable[float]) -> Mean:
    """Return the mean of values and the interval by Student's t."""
    x = list(values)
    middle = sum(x) / len(x)
    if len(x) < 2:
        return Mean(middle, math.nan, math.nan, len(x))
    spread = math.sqrt(sum((v - middle) ** 2 for v in x) / (len(x) - 1) / len(x))
    half = (T[len(x) - 2] if len(x) - 2 < len(T) else 1.96) * spread
    return Mean(middle, middle - half, middle + half, len(x))


class Cell(NamedTuple):
    """One run: its method, and what it scored."""

    label: str  #: the method's name in the sweep
    method: Mapping[str, Any]  #: its section
    shots: int
    seed: int
    scores: Mapping[str, float]  #: in [0, 1], without the task's name: accuracy, new/accuracy, zero_shot, ...


class Claim(NamedTuple):
    """`better` scores above each of `worse`."""

    text: str
    better: str
    worse: tuple[str, ...]
    shots: Callable[[int], bool]
    score: str = "accuracy"
    equal: bool = False  #: an equal mean is enough


class Verdict(NamedTuple):
    """What a table says to a claim."""

    claim: str
    held: bool | None  #: None: the table has not what it speaks of
    why: str  #: what failed or is missing
    difference: Mean | None  #: of the smallest, where there are several


CLAIMS = (
    Claim("CoOp above zero-shot at 4 and more shots", "coop", (ZERO,), lambda k: k >= 4),
    Claim("CoOp nowhere below the linear probe at 1 and 2 shots", "coop", ("linear_probe",), lambda k: k <= 2,
          equal=True),
    Claim("CLIP-Adapter above the linear probe at 1 to 4 shots", "clip_adapter", ("linear_probe",), lambda k: k <= 4),
    Claim("Tip-Adapter-F above Tip-Adapter", "tip_f", ("tip",), lambda k: True),
    Claim("Tip-Adapter above zero-shot, without training", "tip", (ZERO,), lambda k: True),
    Claim("CoCoOp above CoOp on new classes", "cocoop", ("coop",), lambda k: True, "new/accuracy"),
    Claim("WiSE-FT at 0.5 above both its ends under a style shift", "wise", (ZERO, "full"), lambda k: True,
          "shift/accuracy"),
)  # fmt: skip


def role(method: Mapping[str, Any]) -> str:
    """Return what a method's section makes of it in the claims."""
    name = str(method.get("name"))
    if name == "tip_adapter":
        return "tip_f" if method.get("train_keys") else "tip"
    if name == "full":
        wise = method.get("wise")
        return "full" if wise in (None, 1, 1.0) else "wise" if wise == 0.5 else f"wise_{wise}"
    return name


def judge(cells: Iterable[Cell], claims: Iterable[Claim] = CLAIMS) -> list[Verdict]:
    """Return a verdict on each claim.

    Of several variants of a method that have the score, the first in the alphabet speaks for it.
    """
    known = sorted(cells, key=lambda c: (c.label, c.shots, c.seed))
    return [_judge(claim, _speakers(claim, known)) for claim in claims]


def _speakers(claim: Claim, cells: list[Cell]) -> dict[tuple[str, int, int], Mapping[str, float]]:
    """Return the scores that a claim may use by role, shots and seed."""
    chosen: dict[str, str] = {}
    scored = [cell for cell in cells if claim.score in cell.scores]
    for cell in scored:
        chosen.setdefault(role(cell.method), cell.label)
    return {(role(c.method), c.shots, c.seed): c.scores for c in scored if chosen[role(c.method)] == c.label}


def _judge(claim: Claim, runs: Mapping[tuple[str, int, int], Mapping[str, float]]) -> Verdict:
    results = []
    for other in claim.worse:
        pairs = _pairs(claim, other, runs)
        if not pairs:
            at = " at its shots" if any(key[0] == claim.better for key in runs) else ""
            why = f"needs {claim.better} and {other}{at}, with {claim.score}"
            return Verdict(claim.text, None, why, None)
        by_shots = {k: mean(d for (s, _), d in pairs.items() if s == k).value for k in sorted({k for k, _ in pairs})}
        failed = [k for k, found in by_shots.items() if found < 0 or (found == 0 and not claim.equal)]
        results.append((_pooled(pairs), [f"{other} at {k}" for k in failed]))
    smallest = min((found for found, _ in results), key=lambda found: found.value)
    lost = [where for _, failed in results for where in failed]
    why = f"not above {', '.join(lost)} shots" if lost else ""
    return Verdict(claim.text, not lost, why, smallest)


def _pairs(
    claim: Claim, other: str, runs: Mapping[tuple[str, int, int], Mapping[str, float]]
) -> dict[tuple[int, int], float]:
    """Return differences by shots and seed."""
    found = {}
    for (name, shots, seed), scored in runs.items():
        if name != claim.better or not claim.shots(shots):
            continue
        zero = claim.score.replace("accuracy", ZERO)
        against = scored.get(zero) if other == ZERO else runs.get((other, shots, seed), {}).get(claim.score)
        if against is not None:
            found[shots, seed] = scored[claim.score] - against
    return found


def _pooled(pairs: Mapping[tuple[int, int], float]) -> Mean:
    """Return the mean over seeds of differences averaged over shots."""
    seeds = sorted({seed for _, seed in pairs})
    return mean(mean(d for (_, s), d in pairs.items() if s == seed).value for seed in seeds)

"""Which rules each sample breaks, what its score is, and the report of it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools import _choice, _engine, _pack, _rows, _rules, _tar
from pretrain.config import ConfigError
from pretrain.data import format as shards
from pretrain.data import headers
from pretrain.data.decode import BadSample

VERSION = 1
UNUSABLE, NO_SCORE, MIN_SCORE, FRACTION = "unusable", "no score", "min-score", "keep-fraction"
LIST, REPORT = "dropped.jsonl", "filter-report.json"


class Ask(NamedTuple):
    """What a worker is told."""

    path: Path
    limits: _rules.Options


class Verdict(NamedTuple):
    """Which of N samples break which of R rules."""

    rules: list[str]
    broken_NR: NDArray[np.bool_]

    @property
    def kept_N(self) -> NDArray[np.bool_]:
        """Return which samples stay."""
        return ~self.broken_NR.any(1)

    def also(self, name: str, broken_N: NDArray[np.bool_]) -> "Verdict":
        """Return the verdict with one more rule."""
        return Verdict([*self.rules, name], np.concatenate([self.broken_NR, broken_N[:, None]], 1))


def names(limits: _rules.Options) -> list[str]:
    """Return the names of all rules, in the order in which they are told."""
    return [UNUSABLE, *_rules.picture_rules(limits), *_rules.caption_rules(limits)]


def judged(asked: Ask) -> bytes:
    """Return which rules each sample of a shard breaks."""
    pictures, captions = _rules.picture_rules(asked.limits), _rules.caption_rules(asked.limits)
    rows: list[list[bool]] = []
    with _tar.opened(asked.path) as tar:
        for entry in headers.entries_of(asked.path):
            try:
                picture, said = tar.picture(entry), tar.captions(entry)
            except BadSample:
                rows.append([True] + [False] * (len(pictures) + len(captions)))
                continue
            broken = [rule(picture) for rule in pictures.values()]
            broken += [any(map(rule, said)) for rule in captions.values()]
            rows.append([False, *broken])
    width = 1 + len(pictures) + len(captions)
    return _pack.pack({}, broken=np.array(rows, bool).reshape(-1, width))


def judge(source: Sequence[_rows.Shard], limits: _rules.Options, *, state: Path, engine: _engine.Engine) -> Verdict:
    """Return what the rules about pictures and words say."""
    tasks = [
        _engine.Task(
            f"rules-{number:06d}",
            Ask(shard.path, limits),
            _engine.digest(shard.path, tuple(limits), VERSION),
            shard.path.stat().st_size,
        )
        for number, shard in enumerate(source)
    ]
    results = _engine.run(judged, tasks, state=state, engine=engine, doing="filter")
    return Verdict(names(limits), np.concatenate([_pack.unpack(result)[1]["broken"] for result in results]))


def scores(path: Path, column: str, source: Sequence[_rows.Shard]) -> NDArray[np.float64]:
    """Return the score of each sample, NaN for one that the table does not name.

    Raises:
        ConfigError: the table names none of them, or holds no numbers.
    """
    by_name = _choice.shards_by_name(source)
    keys: dict[int, dict[str, int]] = {}
    found = [np.full(len(shard.lines), np.nan) for shard in source]
    for row, (name, key, score) in enumerate(_choice.read(path, ("shard", "key", column)), 1):
        number = by_name.get(Path(str(name)).name)
        if number is None:
            continue  # the table may be of a larger set
        if number not in keys:
            keys[number] = {_rows.key_of(line): at for at, line in enumerate(source[number].lines)}
        at = keys[number].get(str(key))
        try:
            if at is not None:
                found[number][at] = float(score)
        except (TypeError, ValueError):
            raise ConfigError(f"{path}, row {row}: the score {score!r} is no number") from None
    score_N = np.concatenate(found)
    if np.isnan(score_N).all():
        raise ConfigError(f"{path}: names no sample of this set; are shard and key those of {source[0].path.name}?")
    return score_N


def by_score(verdict: Verdict, score_N: NDArray[np.float64], *, least: float | None, fraction: float | None) -> Verdict:
    """Return the verdict with the rules about scores; equal scores stay in the order of the set."""
    missing = np.isnan(score_N)
    verdict = verdict.also(NO_SCORE, missing)
    if least is not None:
        verdict = verdict.also(MIN_SCORE, ~missing & (score_N < least))
    if fraction is not None:
        passed = np.flatnonzero(verdict.kept_N)
        best = passed[np.argsort(-score_N[passed], kind="stable")][: round(fraction * len(passed))]
        late = np.zeros(len(score_N), bool)
        late[passed] = True
        late[best] = False
        verdict = verdict.also(FRACTION, late)
    return verdict


def write(verdict: Verdict, source: Sequence[_rows.Shard], out: Path) -> None:
    """Write report and list, and print how many each rule dropped."""
    gone = np.flatnonzero(~verdict.kept_N)
    first = verdict.broken_NR[gone].argmax(1)
    counts = Counter(verdict.rules[rule] for rule in first.tolist())
    total = len(verdict.broken_NR)
    report = {
        "samples": total,
        "kept": total - len(gone),
        "dropped": {rule: counts[rule] for rule in verdict.rules},
        "broken": dict(zip(verdict.rules, verdict.broken_NR.sum(0).tolist())),
    }
    rows = _rows.all_rows(source)
    lines = []
    for at, rule in zip(gone.tolist(), first.tolist()):
        shard, member = rows[at].tolist()
        place = {"shard": source[shard].path.name, "key": _rows.key_of(source[shard].lines[member])}
        lines.append(json.dumps({**place, "because": verdict.rules[rule]}) + "\n")
    shards.write_atomic(out / LIST, "".join(lines).encode())
    shards.write_atomic(out / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    print(f"{out / REPORT}: {report['kept']} of {total} samples stay")
    print("   dropped    broken  (dropped: counted for the first rule that a sample breaks)")
    for rule in verdict.rules:
        print(f"  {report['dropped'][rule]:>8}  {report['broken'][rule]:>8}  {rule}")

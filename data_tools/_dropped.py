"""What dedup decided, for programs and for people: dropped.jsonl, dedup-report.json and dropped.html."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import _page, _rows, _tar
from data_tools._duplicates import KEPT
from data_tools._likeness import Found
from pretrain.data import format as shards
from pretrain.data.decode import BadSample

LIST, REPORT, PAGE = "dropped.jsonl", "dedup-report.json", "dropped.html"
SHOWN = 40  # pairs of each reason on the page
WHAT = {"bytes": "the same bytes", "image": "a picture that looks alike", "caption": "a like caption"}


def write(found: Found, source: Sequence[_rows.Shard], out: Path) -> None:
    """Write list, report and page, and print the counts."""
    gone = np.flatnonzero(found.onto_N[: len(found.rows)] != KEPT)
    counts = Counter(found.reasons[why] for why in found.why_N[gone].tolist())
    lines = [json.dumps(row) + "\n" for row in (_row(found, source, at) for at in gone.tolist())]
    shards.write_atomic(out / LIST, "".join(lines).encode())
    held = int((found.onto_N[gone] >= len(found.rows)).sum())
    report = {
        "samples": len(found.rows),
        "dropped": len(gone),
        "dropped_for": {reason: counts[reason] for reason in found.reasons},
        "like_a_held_out_one": held,
        "without_readable_picture": found.bad,
    }
    shards.write_atomic(out / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    shards.write_atomic(out / PAGE, _shown(found, source, gone.tolist(), report).encode())
    print(f"{out / LIST}: {len(gone)} of {len(found.rows)} samples go")
    for reason in found.reasons:
        print(f"  {counts[reason]:>8}  {WHAT[reason]}")
    if held:
        print(f"  {held:>8}  of them are like a held-out sample")
    if found.bad:
        print(f"  {found.bad:>8}  pictures could not be read; they stay, `validate --decode` names them")


def _row(found: Found, source: Sequence[_rows.Shard], at: int) -> dict[str, Any]:
    other = int(found.onto_N[at])
    row = {**_place(found, source, at), "because": found.reasons[found.why_N[at]]}
    if row["because"] == "image":
        row["bits"] = int(found.looks_N[at] ^ found.looks_N[other]).bit_count()
    return {**row, **{f"kept_{name}": value for name, value in _place(found, source, other).items()}}


def _place(found: Found, source: Sequence[_rows.Shard], at: int) -> dict[str, str]:
    shard, member = found.all_rows[at].tolist()
    return {"shard": source[shard].path.name, "key": _rows.key_of(source[shard].lines[member])}


def _shown(found: Found, source: Sequence[_rows.Shard], gone: list[int], report: dict[str, Any]) -> str:
    parts = [_page.tiles([("samples", f"{report['samples']:,}"), ("dropped", f"{report['dropped']:,}")])]
    for number, reason in enumerate(found.reasons):
        some = [at for at in gone if found.why_N[at] == number]
        some = sorted(some, key=lambda at: _rows.mark(*_place(found, source, at).values()))[:SHOWN]
        pairs = (
            f'<div class="pair">{_figure(found, source, at, "goes")}'
            f"{_figure(found, source, int(found.onto_N[at]), 'stays')}</div>"
            for at in some
        )
        count = report["dropped_for"][reason]
        note = f"{count:,} samples; {len(some)} of them, chosen by hash of their key" if some else "none"
        parts.append(_page.section(WHAT[reason], f'<div class="pairs">{"".join(pairs)}</div>', note=note))
    lead = "Left what goes, right the sample that stays instead."
    return _page.page("What dedup drops", lead, parts, f"The whole list is {LIST}.")


def _figure(found: Found, source: Sequence[_rows.Shard], at: int, fate: str) -> str:
    shard, member = found.all_rows[at].tolist()
    entry = shards.read_row(source[shard].lines[member])
    small = f"{fate}: {source[shard].path.name} / {entry.key}"
    with _tar.opened(source[shard].path) as tar:
        try:
            caption = tar.captions(entry)[0]
        except BadSample as error:
            caption = f"({error})"
        try:
            return _page.picture(tar.image(entry), caption, small)
        except BadSample as error:
            return _page.card(small, _page.text(f"{caption} ({error})"))

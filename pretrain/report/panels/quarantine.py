"""Samples that could not be used: reasons counted, and the first of them."""

from collections import Counter

from pretrain.report import page
from pretrain.report.run import Run

SHOWN = 20


def panel(run: Run) -> str:
    """Return reasons with counts, and the first samples."""
    lines = run.lines("quarantine.jsonl")
    if not lines:
        return page.section("Quarantine", "<p>every sample could be used</p>")
    reasons = Counter(str(line.get("reason", ""))[:120] for line in lines).most_common(SHOWN)
    rows = [(line.get("shard", ""), line.get("key", ""), line.get("reason", "")) for line in lines[:SHOWN]]
    body = page.table(("reason", "samples"), reasons) + "<br>" + page.table(("shard", "key", "reason"), rows)
    return page.section("Quarantine", body, f"{len(lines):,} samples were replaced by neighbours")

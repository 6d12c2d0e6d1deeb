"""Scores by step, and the newest with their 95 % intervals."""

from collections import defaultdict

from pretrain.report import page
from pretrain.report.run import Run


def panel(run: Run) -> str:
    """Return the newest scores as a table, and curves where a score was taken more than once."""
    steps: dict[str, dict[int, dict]] = defaultdict(dict)
    for line in run.lines("evals.jsonl"):
        if {"step", "name", "value", "low", "high"} <= line.keys():
            steps[str(line["name"])][int(line["step"])] = line
    if not steps:
        return page.section("Scores", "<p>no eval has run yet</p>")
    rows = []
    for name, found in sorted(steps.items()):
        line = found[max(found)]
        interval = f"[{100 * line['low']:.1f}, {100 * line['high']:.1f}]"
        rows.append((name, line["step"], f"{100 * line['value']:.1f} %", interval, line.get("count", "")))
    body = page.table(("score", "step", "value", "95 % interval", "samples"), rows)
    groups: dict[str, dict[str, page.Points]] = defaultdict(dict)
    for name, found in sorted(steps.items()):
        if len(found) > 1:
            group, _, rest = name.rpartition("/")
            groups[group][rest] = [(step, 100 * found[step]["value"]) for step in sorted(found)]
    return page.section("Scores", body + page.grid(page.card(f"{n}, %", page.curves(c)) for n, c in groups.items()))

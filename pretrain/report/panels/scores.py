"""Scores by step, and the newest with their 95 % intervals."""

from collections import defaultdict

from pretrain.metrics.interval import shown, sign
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
        unit = _unit(line)
        interval = f"[{shown(line['low'], unit)}, {shown(line['high'], unit)}]"
        rows.append((name, line["step"], shown(line["value"], unit) + sign(unit), interval, line.get("count", "")))
    body = page.table(("score", "step", "value", "95 % interval", "samples"), rows)
    groups: dict[str, dict[str, page.Points]] = defaultdict(dict)
    for name, found in sorted(steps.items()):
        if len(found) > 1:
            unit = _unit(found[max(found)])
            group, _, rest = name.rpartition("/")
            scale = 100 if unit else 1
            groups[group + {"%": ", %", "points": ", points"}.get(unit, "")][rest] = [
                (step, scale * found[step]["value"]) for step in sorted(found)
            ]
    return page.section("Scores", body + page.grid(page.card(name, page.curves(c)) for name, c in groups.items()))


def _unit(line: dict) -> str:
    return str(line.get("unit", "%"))

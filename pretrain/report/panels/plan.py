"""What the plan said before the run, beside what the run took."""

from pretrain.report import page
from pretrain.report.run import Run


def panel(run: Run) -> str:
    """Return the plan's figures with the last measured ones."""
    tree = run.tree("plan.json")
    if not tree:
        return ""
    last = run.metrics[-1] if run.metrics else {}
    needs, gib = tree.get("memory", {}), 2**30
    foreseen = tree.get("resident") or needs.get("peak") or 0
    rows = [
        ("memory of a rank, GiB", f"{foreseen / gib:.2f}", f"{last['memory']:.2f}" if "memory" in last else ""),
        ("samples/s", f"{tree.get('pairs_per_s') or 0:.4g}", f"{last.get('samples_per_s', 0):.4g}"),
        ("steps", tree.get("outlook", {}).get("steps") or "", last.get("step", "")),
        ("GFLOP a sample", f"{tree.get('step', {}).get('flops', 0) / 1e9:.4g}", ""),
    ]
    warnings = "".join(f"<p>warning: {page.text(sentence)}</p>" for sentence in tree.get("warnings", []))
    return page.section("Plan", page.table(("", "planned", "last measured"), rows) + warnings)

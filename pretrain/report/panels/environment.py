"""Versions, commit, host and command of the last start."""

from pretrain.report import page
from pretrain.report.run import Run


def panel(run: Run) -> str:
    """Return environment.json as a table."""
    tree = run.tree("environment.json")
    rows = []
    for name, value in tree.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        rows.append((name, "" if value is None else value))
    return page.section("Environment", page.table(("", ""), rows)) if rows else ""

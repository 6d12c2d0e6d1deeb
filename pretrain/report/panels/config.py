"""The resolved config."""

from pretrain.report import page
from pretrain.report.run import Run


def panel(run: Run) -> str:
    """Return config.yaml as it is."""
    return page.section("Config", f'<div class="card"><pre>{page.text(run.text("config.yaml"))}</pre></div>')

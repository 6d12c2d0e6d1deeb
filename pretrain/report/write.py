"""report.html of a run: its panels, one file each, in one self-contained page."""

import time
from collections.abc import Callable
from pathlib import Path

from pretrain import registry
from pretrain.data.format import write_atomic
from pretrain.report import page
from pretrain.report.run import Run

FILE = "report.html"
PANELS = "pretrain.report.panels"
#: others come behind these
ORDER = ("scores", "curves", "throughput", "retrieval", "written", "quarantine", "plan", "environment", "config")


def html(folder: Path) -> str:
    """Return the report of a run folder."""
    run = Run(folder)
    names = registry.names(PANELS)
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    last = run.metrics[-1] if run.metrics else {}
    lead = f"{last.get('step', 0):,} steps, {last.get('samples', 0):,} samples"
    if last.get("time"):
        lead += f", last heard of {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(last['time']))}"
    return page.page(folder.resolve().name, lead, (registry.find(PANELS, name).panel(run) for name in names))


def write(folder: str | Path, *, check: Callable[[], None] = lambda: None) -> Path:
    """Write the report into a run folder and return its path; `check` is called before it is there, and may raise."""
    path = Path(folder) / FILE
    write_atomic(path, html(Path(folder)).encode(), check=check)
    return path

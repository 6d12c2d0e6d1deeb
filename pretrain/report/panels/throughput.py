"""Speed, data wait, share of the device's peak and memory by step; where a profiled step's time went."""

from pretrain.report import page
from pretrain.report.run import Run

PLOTS = {
    "samples/s": ("samples_per_s", 1.0),
    "data wait, ms a step": ("data_wait", 1000.0),
    "step, ms": ("step_time", 1000.0),
    "MFU, %": ("mfu", 100.0),
    "TFLOP/s a device": ("tflops_per_device", 1.0),
    "memory that is reserved on the device, GiB": ("memory_reserved", 1.0),
    "resident memory of the process, GiB": ("rss", 1.0),
    "device memory or peak of the process, GiB": ("memory", 1.0),
}


def panel(run: Run) -> str:
    """Return one plot a quantity."""
    cards = []
    for title, (name, factor) in PLOTS.items():
        points = [(step, factor * value) for step, value in run.series(name)]
        if points:
            cards.append(page.card(title, page.curves({title: points})))
    phases = run.tree("profile/phases.json")
    rows = [
        (n, f"{v.get('host', 0):.2f}", f"{v.get('device', 0):.2f}") for n, v in phases.items() if isinstance(v, dict)
    ]
    if rows:
        cards.append(page.card("profiled steps, ms a step", page.table(("phase", "host", "device"), rows)))
    return page.section("Throughput", page.grid(cards)) if cards else ""

"""The loss, its parts, the learning rate and the gradient's norm by step."""

from pretrain.report import page
from pretrain.report.run import Run

#: in the throughput panel, or of the moment only
ELSEWHERE = {
    "step", "samples", "samples_per_s", "samples_per_s_per_device", "data_wait", "step_time", "memory", "rss", "mfu",
    "memory_reserved", "tflops_per_device", "eta", "to_checkpoint", "time",
}  # fmt: skip


def panel(run: Run) -> str:
    """Return one plot a scalar."""
    names = dict.fromkeys(name for line in run.metrics for name in line if name not in ELSEWHERE)
    first = [name for name in ("loss", "lr", "grad_norm") if name in names]
    ordered = [*first, *sorted(name for name in names if name not in first)]
    cards = [page.card(name, page.curves({name: found})) for name in ordered if (found := run.series(name))]
    return page.section("Training", page.grid(cards) if cards else "<p>no step is done yet</p>")

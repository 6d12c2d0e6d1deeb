"""Where the time of a step goes in both trainers, in one start of each with clocks in it (stages.py)."""

import json
from pathlib import Path

from tests.benchmarks.trainers import Task, run

STAGES = ("data", "image", "text", "loss", "optimizer", "rest")


def lines(task: Task, python: str, folder: Path) -> list[str]:
    """Return the table of stages in milliseconds a step."""
    place, found = folder / "watched", {}
    for name in ("open_clip", "diptych"):
        file = folder / f"stages-{name}.json"
        if name == "diptych":
            command = task.ours(place, entry=("tests/benchmarks/stages.py", str(file)))
        else:
            command = task.open_clip(python, place, entry=("--stages", str(file)))
        run(command, place, ranks=task.ranks, device=task.device)
        found[name] = json.loads(file.read_text())
    columns = (*STAGES, "in flight")
    out = [
        "Milliseconds of a step, one start of each with clocks in it; the stages add up, forward and backward as one.",
        "`optimizer`: from the end of backward to the next step. `in flight`: collectives under way, across stages.",
        "",
        "| | " + " | ".join(columns) + " | whole step |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, means in found.items():
        values = [1000 * means.get(stage, 0.0) for stage in columns]
        whole = sum(values[: len(STAGES)])
        out.append(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in [*values, whole]) + " |")
    return [*out, ""]

"""A look into a few steps: torch's profiler around them, a trace for chrome://tracing and a table of where time goes.

Ranges carry the names of PHASES; they cost a microsecond where nobody looks. A range on the host counts until its last
kernel is launched, so on a GPU the device's column is the one to read. What ranks exchange lies inside other phases.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import Section
from pretrain.data.format import write_atomic

PHASES = ("data", "image tower", "text tower", "forward", "backward", "optimizer")
WIRES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")  # how events of collectives begin
FOLDER = "profile"


class Config(Section):
    """The `profile:` section."""

    start: int | None = Field(None, ge=1)  #: first step (from 1) that is looked at; none: no step is
    steps: int = Field(3, ge=1)
    memory: bool = False  #: also what each operator allocates; makes the trace large


def windowed(batches: Iterator[Batch], config: Config, folder: Path, *, first: int) -> Iterator[Batch]:
    """Yield the batches of steps `first` (from 0), ...; the steps of the window run under the profiler.

    Rank 0 writes FOLDER/trace.json, FOLDER/phases.json and prints the table when the window ends.
    """
    profiler: torch.profiler.profile | None = None
    done = first
    try:
        while True:
            if dist.is_main() and config.start is not None and done + 1 == config.start:
                profiler = _begin(config)
            if profiler is not None and config.start is not None and done + 1 == config.start + config.steps:
                _end(profiler, folder, steps=config.steps)
                profiler = None
            with torch.profiler.record_function("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            done += 1
    finally:
        if profiler is not None and config.start is not None:  # the run ended inside the window
            _end(profiler, folder, steps=max(1, done + 1 - config.start))


def _begin(config: Config) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, profile_memory=config.memory)
    profiler.start()
    return profiler


def _end(profiler: torch.profiler.profile, folder: Path, *, steps: int) -> None:
    profiler.stop()
    out = folder / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "trace.json"))
    found = phases(profiler, steps=steps)
    write_atomic(out / "phases.json", json.dumps(found, indent=1).encode())
    print(table(found) + f"\ntrace: {out / 'trace.json'} (open it in chrome://tracing)", flush=True)


def phases(profiler: torch.profiler.profile, *, steps: int) -> dict[str, dict[str, float]]:
    """Return milliseconds a step of each phase, on the host and on the device; communication is part of the others."""
    out = {name: {"host": 0.0, "device": 0.0} for name in (*PHASES, "communication")}
    for event in profiler.key_averages():
        wire = str(event.key).startswith(WIRES)
        if event.key in PHASES or wire:
            row = out["communication" if wire else str(event.key)]
            row["host"] += event.cpu_time_total / 1000 / steps
            row["device"] += _device(event) / 1000 / steps
    loss = out.pop("forward")  # of which the towers are not the loss
    for side in loss:
        loss[side] = max(0.0, loss[side] - out["image tower"][side] - out["text tower"][side])
    order = ("data", "image tower", "text tower", "loss", "backward", "optimizer", "communication")
    return {name: loss if name == "loss" else out[name] for name in order}


def _device(event: Any) -> float:
    return float(getattr(event, "device_time_total", 0.0))


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the phases as a table, milliseconds a step."""
    lines = [f"{'phase':<16}{'host ms':>10}{'device ms':>11}"]
    lines += [f"{name:<16}{row['host']:>10.2f}{row['device']:>11.2f}" for name, row in found.items()]
    return "\n".join(lines)

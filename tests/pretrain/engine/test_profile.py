"""The window that is profiled: which steps, what it leaves, and that a run without it is left alone."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from pretrain.engine.profile import Config, windowed
from tests import tiny


def steps(folder: Path, config: Config, *, count: int, first: int = 0) -> list[bool]:
    """Walk through batches as a trainer does; return for each step whether it was profiled."""
    seen = []
    batches = (tiny.batch(2, seed=n) for n in range(count))
    for _ in windowed(batches, config, folder, first=first):
        seen.append(torch.autograd._profiler_enabled())
        with record_function("forward"):
            with record_function("image tower"):
                torch.ones(64, 64) @ torch.ones(64, 64)
            torch.ones(64, 64).exp()
        with record_function("backward"):
            torch.ones(64, 64) @ torch.ones(64, 64)
    return seen


def test_a_window_leaves_a_trace_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert steps(tmp_path, Config(start=4, steps=2), count=5, first=1) == [False, False, True, True, False]
    found = json.loads((tmp_path / "profile/phases.json").read_text())
    assert found["image tower"]["host"] > 0 and found["loss"]["host"] > 0 and found["optimizer"]["host"] == 0
    trace = json.loads((tmp_path / "profile/trace.json").read_text())
    assert [e["name"] for e in trace["traceEvents"]].count("backward") == 2
    assert "image tower" in capsys.readouterr().out


def test_a_run_that_ends_inside_the_window_leaves_them_too(tmp_path: Path) -> None:
    assert steps(tmp_path, Config(start=2, steps=9), count=3) == [False, True, True]
    assert (tmp_path / "profile/trace.json").exists()


def test_no_window_no_folder(tmp_path: Path) -> None:
    assert steps(tmp_path, Config(), count=2) == [False, False]
    assert steps(tmp_path, Config(start=2, steps=1), count=3, first=7) == [False, False, False]
    assert not (tmp_path / "profile").exists()

"""What whole runs really hold: tensors as torch's allocator counts them, and the process as the kernel does.

python -m tests.pretrain.memory_of_runs < JOBS, where JOBS is a JSON list of [config file, override, ...].

Each run is a process of its own, forked after all imports, so that its start is the same as any other's. Tensors are
counted under torch's profiler, which takes memory itself: the resident size is taken from a second run without it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def resident(key: str = "VmHWM") -> int:
    """Return bytes of this process by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def train(job: list[str]) -> None:
    """Run pretraining to its end."""
    from pretrain import config, main, recipe
    from pretrain.engine import process

    device = process.setup_process_group()
    assert main.train(config.load(recipe.Recipe, job[0], job[1:]), device) == 0


def tensors(job: list[str]) -> dict[str, int]:
    """Return the most bytes of tensors."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        train(job)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {"tensors": peak}


def process_size(job: list[str]) -> dict[str, int]:
    """Return the size of the process after imports and at most."""
    before = resident("VmRSS")
    train(job)
    return {"before": before, "resident": resident()}


def apart(function: Any, job: list[str]) -> dict[str, int]:
    """Return what a function returns in a process of its own."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                Path(file.name).write_text(json.dumps(function(job)))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{job} ended with {status}"
        found: dict[str, int] = json.loads(Path(file.name).read_text())
        return found


def main() -> None:
    """Measure the jobs of stdin and print what was found."""
    import deepspeed  # noqa: F401
    import timm  # noqa: F401
    import torch.profiler  # noqa: F401

    import pretrain.main  # noqa: F401

    jobs = json.load(sys.stdin)
    out = [{**apart(tensors, job), **apart(process_size, job)} for job in jobs]
    print("FOUND " + json.dumps(out))


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    main()

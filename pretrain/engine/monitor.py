"""What a run says while it trains: a progress line, metrics.jsonl, TensorBoard and log.txt, all written by rank 0.

Model FLOPs utilisation: mfu = FLOPs of a sample x samples a second and device / FLOPs a second of the device at most
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B; what is computed twice counts once).
"""

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field

from pretrain import dist
from pretrain.config import Section
from pretrain.engine import journal

log = logging.getLogger("diptych")


class Config(Section):
    """The `monitor:` section."""

    log_every: int = Field(10, ge=1)
    tensorboard: bool = True


class Speed(NamedTuple):
    """What a speed in samples is measured against."""

    flops: float | None = None  #: of a sample, forward and backward
    peak: float | None = None  #: FLOP/s of one device


class Monitor:
    """Collects what the steps report; speaks at the first step, every `log_every` steps and at the last."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        steps: int,
        start: int,
        batch_size: int,
        device: torch.device,
        speed: Speed | None = None,
        save_every: int | None = None,
    ) -> None:
        """`start` is the number of steps that are done already: lines beyond it are dropped from metrics.jsonl."""
        self.speed = speed or Speed()
        self.save_every = save_every
        self.batch_size = batch_size
        self.config = config
        self.folder = folder
        self.steps = steps
        self.device = device
        self._first = start + 1
        self._since: list[tuple[float, float]] = []  # seconds of a step, of which waiting for data
        self._metrics: Any = None
        self._board: Any = None
        if dist.is_main():
            journal.truncate(folder / "metrics.jsonl", start)
            self._metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(self._handler)
            log.setLevel(logging.INFO)
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def due(self, step: int) -> bool:
        """Return whether `step` (steps done, from 1) is reported."""
        return step in (self._first, self.steps) or step % self.config.log_every == 0

    def record(self, step: int, *, seconds: float, data_wait: float, scalars: dict[str, float]) -> None:
        """Account for a step; `scalars` (loss, lr, parts of the loss) are the same on all ranks."""
        self._since.append((seconds, data_wait))
        if not self.due(step):
            return
        spent, waited = (sum(column) for column in zip(*self._since))
        n, self._since = len(self._since), []
        speed = n * self.batch_size / max(spent, 1e-9)
        if not dist.is_main():
            return
        tree = {
            "step": step,
            "samples": step * self.batch_size,
            **scalars,
            "samples_per_s": speed,
            "samples_per_s_per_device": speed / dist.world(),
            "data_wait": waited / n,
            "step_time": spent / n,
            "memory": memory(self.device),
            "rss": resident() / 2**30,
            **self._worked(speed / dist.world()),
            **self._ahead(step, spent / n),
            "time": time.time(),
        }
        self._metrics.write(json.dumps(tree) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for key, value in tree.items():
                if key not in ("step", "time"):
                    self._board.add_scalar(key, value, step)
        self._line(tree)

    def _worked(self, speed: float) -> dict[str, float]:
        """Return what is known of the device's work at `speed` samples a second."""
        out = (
            {"memory_reserved": torch.cuda.max_memory_reserved(self.device) / 2**30}
            if self.device.type == "cuda"
            else {}
        )
        if self.speed.flops:
            out["tflops_per_device"] = self.speed.flops * speed / 1e12
            if self.speed.peak:
                out["mfu"] = self.speed.flops * speed / self.speed.peak
        return out

    def _ahead(self, step: int, seconds: float) -> dict[str, float]:
        """Return the seconds to the end and to the next checkpoint, at `seconds` a step."""
        left = {"eta": (self.steps - step) * seconds}
        if self.save_every:
            left["to_checkpoint"] = min(self.save_every - step % self.save_every, self.steps - step) * seconds
        return left

    def _line(self, tree: dict[str, Any]) -> None:
        mfu = f"MFU {100 * tree['mfu']:.1f} %  " if "mfu" in tree else ""
        save = f"save in {clock(tree['to_checkpoint'])}  " if "to_checkpoint" in tree else ""
        line = (
            f"step {tree['step']}/{self.steps}  loss {tree['loss']:.4f}  lr {tree['lr']:.3g}  "
            f"{tree['samples_per_s']:.1f} samples/s  {mfu}"
            f"data wait {100 * tree['data_wait'] / tree['step_time']:.0f} %  "
            f"{tree['memory']:.2f} GiB  {save}ETA {clock(tree['eta'])}"
        )
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if tree["step"] == self.steps else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self._handler.emit(log.makeRecord(log.name, logging.INFO, "", 0, line, (), None))

    def say(self, message: str, *, level: int = logging.INFO) -> None:
        """Print a sentence on rank 0 and keep it in log.txt."""
        if dist.is_main():
            print(("\r\x1b[K" if sys.stderr.isatty() else "") + message, file=sys.stderr, flush=True)
            log.log(level, message)

    def close(self) -> None:
        """Flush and close all files."""
        if self._metrics is not None:
            self._metrics.close()
            log.removeHandler(self._handler)
            self._handler.close()
        if self._board is not None:
            self._board.close()


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def memory(device: torch.device) -> float:
    """Return the most memory that this process has used, GiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def resident() -> int:
    """Return the bytes that this process holds in memory now; its highest so far where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return int(memory(torch.device("cpu")) * 2**30)

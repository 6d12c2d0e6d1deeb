"""The two trainers as their users start them, two ranks and up, and what their own logs say of speed and loss."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.race import ROOT

#: of open_clip's log, one line a step
LINE = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): [\d.]+, ([\d.e+]+)/s.* Loss: ([\d.e+-]+)")
WARM = 2  #: first steps, which are not counted: caches, allocations, open_clip's full shuffle buffer


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both train: the same shards, weights to start from, batch and ranks."""

    config: str  #: ours, of pretrain/configs
    overrides: tuple[str, ...]  #: of ours, for this race
    shards: str
    start: Path  #: folder of open_clip: architecture, tokenizer, first weights
    batch: int
    steps: int
    ranks: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    workers: int = 0
    lr: float = 1e-4
    save: bool = False  #: ours writes a checkpoint half-way

    def ours(self, folder: Path, *, entry: Sequence[str] = ("pretrain/main.py",)) -> list[str]:
        """Return the command that trains with this project into `folder`."""
        return [
            *self._torchrun(sys.executable), *entry, "--config", self.config,
            f"data.shards={self.shards}", "data.reader={caption: {text: [txt]}}", "data.augment={}",
            f"data.workers={self.workers}", f"run.dir={folder.parent}", f"run.name={folder.name}",
            "objectives.contrastive.equal_captions=false", f"train.batch_size={self.batch}", "train.epochs=null",
            f"train.steps={self.steps}", f"train.precision={self.precision}", f"optim.lr={self.lr}",
            "optim.warmup=2", "optim.schedule=constant", "optim.weight_decay=0.1", "monitor.log_every=1", "evals={}",
            f"checkpoint.every_steps={self.steps // 2 if self.save else 10**6}", *self.overrides,
        ]  # fmt: skip

    def open_clip(
        self, python: str, folder: Path, *, context: int | None = None, local: bool = True, entry: Sequence[str] = ()
    ) -> list[str]:
        """Return the command that trains with open_clip's trainer into `folder`.

        `context` cuts its texts. Where not `local`, each rank computes the loss of all rows, and logs it.
        """
        precision = {"fp32": "fp32", "bf16": "amp_bf16"}[self.precision]
        words = [
            *self._torchrun(python), "--", "tests/benchmarks/peer_trainer.py", *entry, "--",
            "--model", f"local-dir:{self.start}", "--dataset-type", "webdataset",
            "--train-data", self.shards, "--dataset-resampled",
            "--train-num-samples", str(self.batch * self.steps), "--batch-size", str(self.batch // self.ranks),
            "--epochs", "1", "--workers", str(self.workers), "--precision", precision, "--lr", str(self.lr),
            "--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-6", "--wd", "0.1", "--warmup", "2",
            "--lr-scheduler", "const", "--grad-clip-norm", "1.0", "--gather-with-grad",
            "--device", self.device, "--dist-backend", "nccl" if self.device == "cuda" else "gloo",
            "--log-every-n-steps", "1", "--logs", str(folder.parent), "--name", folder.name,
        ]  # fmt: skip
        words += ["--local-loss"] if local else []
        return words + (["--force-context-length", str(context)] if context else [])

    def _torchrun(self, python: str) -> list[str]:
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]


class Lap(NamedTuple):
    """What one start of a trainer reports: a value a step, the first WARM left out of all but the losses."""

    rates: list[float]  #: pairs per second of all ranks
    waits: list[float]  #: seconds that a step waited for data
    losses: list[float]
    memory: float | None = None  #: GiB of a rank, where the trainer says so
    stall: float | None = None  #: seconds that training stood still for a save

    @property
    def rate(self) -> float:
        """Pairs per second of the step in the middle."""
        return statistics.median(self.rates)


def run(command: Sequence[str], folder: Path, *, ranks: int, device: str) -> None:
    """Run a trainer to its end; what it says goes to `folder`.log, both get the same threads and pages.

    Raises:
        RuntimeError: it failed; the message carries the end of its log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    cores = len(os.sched_getaffinity(0))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(max(1, cores // ranks))}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    log = folder.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        said = log.read_text(encoding="utf-8")
        first = max(said.find("Traceback"), 0)  # torchrun's own comes after those of the ranks
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{said[first : first + 4000]}")


def read_ours(folder: Path) -> Lap:
    """Return what a run's metrics.jsonl tells."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counted = lines[WARM:]
    pauses = [after["time"] - before["time"] - after["step_time"] for before, after in pairwise(counted)]
    return Lap(
        [line["samples_per_s"] for line in counted],
        [line["data_wait"] for line in counted],
        [line["loss"] for line in lines],
        memory=lines[-1]["memory"],
        stall=max(pauses, default=None),
    )


def read_open_clip(folder: Path) -> Lap:
    """Return what open_clip's out.log tells."""
    found = LINE.findall((folder / "out.log").read_text())
    waits, rates, losses = ([float(value) for value in column] for column in zip(*found))
    return Lap(rates[WARM:], waits[WARM:], losses)

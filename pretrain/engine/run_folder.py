"""What a run leaves behind, and the token that says which start of the run may write there.

runs/NAME/config.yaml environment.json log.txt metrics.jsonl tensorboard/ checkpoints/ .incarnation
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.data.format import write_atomic
from pretrain.engine import journal

LOGS = ("log.txt", "metrics.jsonl", "quarantine.jsonl", "faults.jsonl")
PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "timm", "webdataset", "numpy", "diptych")


class StaleRunError(RuntimeError):
    """Another start of the same run has taken over this folder; this process must not write any more."""


class RunFolder:
    """The folder of a run, before and after this process owns it."""

    def __init__(self, path: str | Path, *, config: str = "") -> None:
        """Name the folder; `config` is the resolved config as YAML. Nothing is written before `claim`."""
        self.path = Path(path)
        self.token = ""
        self._config = config

    def claim(self) -> None:
        """Take the folder over: earlier processes of the run refuse to write from then on. All ranks call it.

        It comes after a resume was found possible, so that a refused start leaves config.yaml and a running job alone.

        Raises:
            ConfigError: the folder cannot be written.
        """
        token, problem = uuid.uuid4().hex, None
        if dist.is_main():
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path / ".incarnation", token.encode())
                self._take_from_earlier_starts()
                if self._config:
                    write_atomic(self.path / "config.yaml", self._config.encode())
                write_atomic(self.path / "environment.json", json.dumps(describe(), indent=1).encode())
            except OSError as error:
                problem = f"run.dir: {self.path} cannot be written ({error}); choose another run.dir or free space"
        self.token, problem = dist.broadcast_object((token, problem))
        if problem:
            raise ConfigError(problem)

    def _take_from_earlier_starts(self) -> None:
        """Let nothing that an earlier start has begun to write appear under a name: see engine/journal.py.

        What it is about to rename goes, too, so that the rename fails.
        """
        for left in (*self.path.glob(".*.part"), *self.checkpoints.glob(".*.part")):
            shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)
        logs = [*(self.path / name for name in LOGS), *self.path.glob("tensorboard/*")]
        journal.renew((path for path in logs if path.is_file()), beside=self.path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def owned(self) -> bool:
        """Return whether no newer start has claimed the folder."""
        try:
            self.check_token()
        except StaleRunError:
            return False
        return True

    def check_token(self) -> None:
        """Refuse to go on where a newer start of this run has claimed the folder.

        Raises:
            StaleRunError: this process was cut off and replaced, or the folder is gone.
        """
        try:
            current = (self.path / ".incarnation").read_text()
        except OSError as error:
            raise StaleRunError(f"{self.path}: the run folder is gone ({error}); nothing was written") from error
        if current != self.token:
            raise StaleRunError(
                f"{self.path}: a newer start of this run has taken over the folder; this process stops without writing"
            )


def describe() -> dict[str, Any]:
    """Return versions, host, commit and launch command."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "world": dist.world(),
        "python": platform.python_version(),
        "packages": dict(_versions(PACKAGES)),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "commit": _commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "launch": os.environ.get("DIPTYCH_LAUNCH"),  # by which launcher/ tells a start of its own from another's
    }


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _commit() -> str | None:
    """Return the commit of the code that runs, with + where files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()

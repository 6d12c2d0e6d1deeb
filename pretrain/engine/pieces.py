"""What a checkpoint folder holds and how it is read: by kind, parameter name and element, whoever wrote which part.

A piece is called `weight:NAME:START` (or exp_avg, exp_avg_sq, buffer): elements START.. of the flattened parameter.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import dist
from pretrain.config import ConfigError

NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why and what to do."""


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name[5:])


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, newest first.

    Later steps than `latest` names belong to a branch that was left when the run went back to an older checkpoint.
    """
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and (p / "COMPLETE").is_file()]
    found.sort(key=step_of, reverse=True)
    try:
        latest = NAME.fullmatch((folder / "latest").read_text().strip())
    except OSError:
        return found
    return [p for p in found if latest is None or step_of(p) <= int(latest.group(1))]


def given(path: Path) -> list[Path]:
    """Return the checkpoint at `path`, or those of the run folder at `path`, newest first."""
    if (path / "COMPLETE").is_file():
        return [path]
    return complete(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def verify(path: Path) -> None:
    """Check sizes of all files, and the sums of this rank's share of them.

    Raises:
        ValueError: a file is missing, short or altered.
    """
    files = json.loads((path / "COMPLETE").read_bytes())["files"]
    for i, (name, facts) in enumerate(sorted(files.items())):
        if not (path / name).is_file() or (path / name).stat().st_size != facts["bytes"]:
            raise ValueError(f"{name} is missing or has another size than when it was saved")
        if i % dist.world() == dist.rank() and digest(path / name) != facts["sha256"]:
            raise ValueError(f"{name} has another SHA-256 than when it was saved")


def compare(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose order or architecture is another.

    Raises:
        ConfigError: which key differs, with both values.
    """
    flat_old, flat_new = dict(flatten(old)), dict(flatten(json.loads(json.dumps(new))))
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "(not set)"), flat_new.get(key, "(not set)")
        if before != after:
            raise ConfigError(
                f"resume: {key} was {before!r} in {path} and is {after!r} now; "
                f"set it back, or start anew with another run.name (or checkpoint.resume=none)"
            )


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


class Pieces:
    """Random access to the pieces of a checkpoint, by kind and parameter name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = defaultdict(list)
        for part in sorted(path.glob("part-*.safetensors")):
            file = safe_open(str(part), framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, rest = key.partition(":")
                name, _, start = rest.rpartition(":")
                numel = file.get_slice(key).get_shape()[0]
                self._where[kind, name].append((int(start), int(start) + numel, key, file))

    def names(self, kind: str) -> list[str]:
        """Return the names that have pieces of a kind."""
        return sorted(name for k, name in self._where if k == kind)

    def read(self, kind: str, name: str, out: Tensor, *, start: int = 0) -> None:
        """Fill the 1-D `out` with elements start .. of a parameter.

        Raises:
            ValueError: the checkpoint does not hold all of them.
        """
        end, filled = start + out.numel(), 0
        for low, high, key, file in self._where[kind, name]:
            a, b = max(low, start), min(high, end)
            if a < b:
                out[a - start : b - start].copy_(file.get_slice(key)[a - low : b - low])
                filled += b - a
        if filled != out.numel():
            raise ValueError(f"{kind} of {name}: {filled} of {out.numel()} elements are there")


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint: step, fingerprint, data state."""
    state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    return state


def read_weights(path: str | Path, *, average: bool = False) -> dict[str, Tensor]:
    """Return the whole parameters and buffers of a checkpoint by name (for export and evaluation; one process).

    With `average`, the moving average of a parameter where the run kept one (engine/ema.py).

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    path = Path(path)
    try:
        verify(path)
        state, pieces, out = read_state(path), Pieces(path), {}
        averaged = set(pieces.names("ema")) if average else ()
        for name, shape in state["parameters"].items():
            out[name] = torch.empty(shape)
            pieces.read("ema" if name in averaged else "weight", name, out[name].view(-1))
        for name, (dtype, *shape) in state["buffers"].items():
            out[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            pieces.read("buffer", name, out[name].view(-1))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: not readable ({error}); use another step") from error
    return out

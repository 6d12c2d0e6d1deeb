"""Checkpoints that know no ZeRO stage and no number of ranks; complete or invisible.

    checkpoints/step-00001000/part-00003-of-00008.safetensors   what rank 3 owns: 1-D pieces of parameters
                              state.json     step, data state, optimizer step, loss scale, fingerprint
                              COMPLETE       size and SHA-256 of every other file
    checkpoints/latest                       the name of the newest one

Each rank writes only what it already holds, so that saving moves no data between ranks; each rank reads only the
pieces that overlap what it will hold. A save goes to a hidden folder, is fsynced, and gets its name by one rename.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from pretrain import dist
from pretrain.config import ConfigError, Section
from pretrain.data.format import write_atomic
from pretrain.engine.pieces import (
    CheckpointError,
    Pieces,
    compare,
    complete,
    digest,
    flatten,
    given,
    read_weights,
    verify,
)
from pretrain.engine.run_folder import RunFolder, StaleRunError
from pretrain.engine.zero import Engine, Fragment

VERSION = 1
log = logging.getLogger("diptych")

__all__ = ["CheckpointError", "Checkpoints", "Config", "complete", "flatten", "given", "read_weights"]


class Config(Section):
    """The `checkpoint:` section."""

    every_steps: int | None = Field(500, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep_last: int = Field(3, ge=1)
    frozen: bool = True  #: also what does not train; fine-tuning leaves it out, as its base has it
    resume: str = "auto"  #: auto: the newest in the run folder, if any; none; or the path of a checkpoint


# -- saving ------------------------------------------------------------------------------------------------------------


def owned(fragments: list[Fragment]) -> list[Fragment]:
    """Return this rank's share, so that every element is written by exactly one rank.

    What all ranks hold is dealt out by size, largest first to the rank with the least; the deal is the same on all.
    """
    mine = [f for f in fragments if not f.replicated]
    load = [0] * dist.world()
    for f in sorted((f for f in fragments if f.replicated), key=lambda f: (-f.weight.numel(), f.name)):
        taker = load.index(min(load))
        load[taker] += f.weight.numel()
        if taker == dist.rank():
            mine.append(f)
    return mine


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's persistent buffers by name."""
    out = {}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                out[name] = buffer
    return out


def _pieces(engine: Engine) -> dict[str, Tensor]:
    """Return what this rank writes, copied to host memory."""
    out = {}
    for f in owned(engine.fragments()):
        for kind, view in {"weight": f.weight, **f.moments}.items():
            out[f"{kind}:{f.name}:{f.start}"] = view
    if dist.is_main():
        out.update({f"buffer:{name}:0": b.reshape(-1) for name, b in buffers(engine.module).items()})
    return {key: view.detach().to("cpu", copy=True) for key, view in out.items()}


def _write_part(engine: Engine, folder: Path) -> dict[str, Any]:
    name = f"part-{dist.rank():05d}-of-{dist.world():05d}.safetensors"
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)  # every rank: a network disk may show it late
    safetensors.torch.save_file(_pieces(engine), path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {name: {"bytes": path.stat().st_size, "sha256": digest(path)}}


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _agree(work: Callable[[], Any], what: str) -> list[Any]:
    """Run local work on every rank and return all results; raise the same error on all where one rank failed."""
    problem, value = None, None
    try:
        value = work()
    except StaleRunError as error:
        problem = ("stale", str(error))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        problem = ("failed", f"rank {dist.rank()}: {error}")
    answers = dist.gather_objects((problem, value))
    for found, _ in answers:
        if found and found[0] == "stale":
            raise StaleRunError(found[1])
        if found:
            raise CheckpointError(f"{what}: {found[1]}")
    return [value for _, value in answers]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self.folder = folder
        self.config = config

    def _on_main(self, work: Callable[[], None], what: str) -> None:
        _agree(work if dist.is_main() else lambda: None, what)

    def save(self, engine: Engine, state: dict[str, Any]) -> Path:
        """Write a checkpoint of `state["step"]`; all ranks call it together.

        Raises:
            CheckpointError: it could not be written (a full disk); older ones are intact, nothing half-written is left.
            StaleRunError: a newer start of the run owns the folder.
        """
        final = self.folder.checkpoints / f"step-{state['step']:08d}"
        hidden = final.with_name(f".{final.name}.{self.folder.token[:8]}.part")
        what = f"checkpoint {final} was not written"
        state = {
            **state,
            "version": VERSION,
            "optimizer_step": engine.optimizer_step(),
            "loss_scale": engine.loss_scale.state() if engine.loss_scale else None,
            "parameters": {name: list(shape) for name, shape in engine.shapes.items()},
            "buffers": {name: [str(b.dtype)[6:], *b.shape] for name, b in buffers(engine.module).items()},
            "world": dist.world(),
            "stage": engine.stage,
        }
        try:
            self._on_main(lambda: shutil.rmtree(hidden, ignore_errors=True), what)
            files: dict[str, Any] = {}
            for part in _agree(lambda: _write_part(engine, hidden), what):
                files.update(part)
            self._on_main(lambda: self._publish(hidden, final, files, state), what)
        except CheckpointError as error:
            if dist.is_main():
                for left in final.parent.glob(f".*{self.folder.token[:8]}.part"):
                    shutil.rmtree(left, ignore_errors=True)
                    left.unlink(missing_ok=True)
            dist.barrier()
            raise CheckpointError(
                f"{error}; the older checkpoints are intact. Free space or lower checkpoint.keep_last, then start again"
            ) from error
        return final

    def _publish(self, hidden: Path, final: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
        write_atomic(hidden / "state.json", json.dumps(state).encode())
        files["state.json"] = {"bytes": (hidden / "state.json").stat().st_size, "sha256": digest(hidden / "state.json")}
        write_atomic(hidden / "COMPLETE", json.dumps({"version": VERSION, "files": files}, indent=1).encode())
        _fsync_folder(hidden)
        latest = final.with_name(f".latest.{self.folder.token[:8]}.part")
        write_atomic(latest, final.name.encode() + b"\n")
        self.folder.check_token()
        old = final.with_name(f".{final.name}.old.part")
        if final.exists():  # saved again at the same step, e.g. after it was found damaged
            os.rename(final, old)
        os.rename(hidden, final)
        os.replace(latest, final.parent / "latest")  # prepared above: needs no space
        _fsync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        older = [path for path in complete(final.parent) if path.name <= final.name]
        for path in older[self.config.keep_last :]:
            shutil.rmtree(path, ignore_errors=True)

    # -- resuming ------------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Path]:
        """Return what `resume` allows, newest first; all ranks call it."""
        found: list[Path] = []
        if dist.is_main():
            if self.config.resume == "auto":
                found = complete(self.folder.checkpoints)
            elif self.config.resume != "none":
                found = given(Path(self.config.resume))
        return [Path(p) for p in dist.broadcast_object([str(p) for p in found])]

    def restore(self, engine: Engine, *, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """Continue from the newest undamaged checkpoint; return its state, or None where there is none.

        Raises:
            ConfigError: it belongs to another order or architecture.
            CheckpointError: there are checkpoints, but each is damaged.
        """
        found = self.candidates()
        if self.config.resume not in ("auto", "none") and not found:
            raise ConfigError(f"checkpoint.resume: {self.config.resume} holds no complete checkpoint; check the path")
        problem = ""
        for path in found:
            try:
                _agree(lambda path=path: verify(path), f"checkpoint {path} is damaged")  # type: ignore[misc]
                state = json.loads((path / "state.json").read_bytes())
                compare(state["fingerprint"], fingerprint, path)
                compare({"parameters": state["parameters"]}, {"parameters": engine.shapes}, path)
                _agree(lambda path=path, state=state: load(engine, path, state), f"checkpoint {path}")  # type: ignore[misc]
            except CheckpointError as error:
                problem = str(error)
                if dist.is_main():
                    log.warning("%s; trying the one before it", error)
                continue
            engine.refresh()
            return {**state, "path": str(path)}
        if found:
            raise CheckpointError(f"{problem}; no older one is left. Remove them, or set checkpoint.resume=none")
        return None


@torch.no_grad()
def load(engine: Engine, path: Path, state: dict[str, Any]) -> None:
    """Fill this rank's fragments and buffers from a checkpoint (no collectives; `engine.refresh` follows)."""
    engine.torch_optimizer.state.clear()  # what a damaged checkpoint may have left
    if state["optimizer_step"]:
        engine.make_moments(state["optimizer_step"])
    pieces = Pieces(path)
    averaged = set(pieces.names("ema"))
    for f in engine.fragments():
        for kind, view in {"weight": f.weight, **f.moments}.items():
            # an average that the run did not keep before starts from the weights
            kind = "weight" if kind == "ema" and f.name not in averaged else kind
            pieces.read(kind, f.name, view, start=f.start)
    for name, buffer in buffers(engine.module).items():
        flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
        pieces.read("buffer", name, flat)
        buffer.copy_(flat.view(buffer.shape))
    if engine.loss_scale and state["loss_scale"]:
        engine.loss_scale.restore(state["loss_scale"])

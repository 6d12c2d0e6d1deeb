"""A rank's share of a checkpoint: what it writes of an engine's state, and what it fills its own part from.

Every element is written by exactly one rank, from what that rank holds anyway; every rank reads the pieces that overlap
what it holds, whichever ranks wrote them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import dist
from pretrain.engine.fragments import Fragment
from pretrain.engine.pieces import Pieces
from pretrain.engine.zero import Engine


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


def written(engine: Engine) -> dict[str, Tensor]:
    """Return views of what this rank writes, by the name of the piece."""
    out = {}
    for f in owned(engine.fragments()):
        for kind, view in {"weight": f.weight, **f.moments}.items():
            out[f"{kind}:{f.name}:{f.start}"] = view
    if dist.is_main():
        # a forward changes these, before the fence that a step of the optimizer waits at
        out.update({f"buffer:{name}:0": b.reshape(-1).clone() for name, b in buffers(engine.module).items()})
    return out


@torch.no_grad()
def load(engine: Engine, path: Path, state: dict[str, Any]) -> None:
    """Fill this rank's fragments and buffers from a checkpoint (no collectives; `engine.state.refresh` follows)."""
    engine.torch_optimizer.state.clear()  # what a damaged checkpoint may have left
    if state["optimizer_step"]:
        engine.state.make_moments(state["optimizer_step"])
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

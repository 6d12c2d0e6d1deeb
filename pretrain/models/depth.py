"""How deep each parameter of a tower lies, and locked towers whose last blocks train nevertheless (LiT).

Layer 0 is the stem (patch or token embedding, positions), layer i + 1 block i; a norm after the blocks goes with the
last of them, as timm has it, and the projection lies on top.
"""

from typing import NamedTuple

from timm.models import group_parameters
from torch import nn

from pretrain.config import ConfigError
from pretrain.models import blocks


class Depth(NamedTuple):
    """Where a parameter lies in its tower, counted from the input."""

    tower: str
    layer: int  #: 0 is the stem
    last: int  #: the tower's topmost layer


def layers(body: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter of a timm trunk, of the native text tower or of a transformers encoder."""
    if hasattr(body, "group_matcher"):
        groups = group_parameters(body, body.group_matcher(coarse=False))
        found = {name: layer for layer, names in groups.items() for name in names}
        return {name: found[name] for name, _ in body.named_parameters()}
    order = list(blocks.find(body))
    out = {}
    for name, _ in body.named_parameters():
        inside = [i for i, block in enumerate(order) if name.startswith(f"{block}.")]
        out[name] = inside[0] + 1 if inside else 0 if "embed" in name else len(order)
    return out


def of_tower(tower: nn.Module, body: nn.Module, name: str) -> dict[str, Depth]:
    """Return where each parameter of a tower lies; what is no part of its body lies on top, as its projection does."""
    inside = {id(p): layer for (_, p), layer in zip(body.named_parameters(), layers(body).values())}
    top = max(inside.values()) + 1
    named = tower.named_parameters()
    return {n: Depth(name, top if n.startswith("projection.") else inside.get(id(p), top), top) for n, p in named}


def lock(body: nn.Module, unlocked: int, *, key: str) -> list[nn.Module]:
    """Freeze a body except its last `unlocked` blocks and what follows them; return the blocks that train.

    Raises:
        ConfigError: it has fewer blocks.
    """
    body.requires_grad_(requires_grad=False)
    if not unlocked:
        return []
    found = blocks.find(body)
    if unlocked > len(found):
        raise ConfigError(f"{key}: {unlocked} blocks, the tower has {len(found)}; set frozen=false to train them all")
    open_blocks = dict(list(found.items())[-unlocked:])
    inside = layers(body)
    lowest = min(layer for name, layer in inside.items() if name.startswith(tuple(f"{b}." for b in open_blocks)))
    for name, p in body.named_parameters():
        p.requires_grad_(inside[name] >= lowest)
    return list(open_blocks.values())

"""The repeated blocks of any tower: recomputed in backward to save memory, or compiled to save time.

Blocks are what a tower is long in: `blocks.3` of a timm ViT or of the native text tower, `encoder.layer.3` of BERT,
`stages.1.blocks.2` of a ConvNeXt, `layer2.1` of a ResNet. Both wrappers replace a block's `forward` and leave names,
parameters and hooks alone, so that checkpoints, exports and ZeRO see the same module.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ConfigError

CONTAINERS = re.compile(r"blocks|layers?\d?|h")


def find(tower: nn.Module) -> dict[str, nn.Module]:
    """Return a tower's blocks by name, from the input up; nested ones (a stage of blocks) at their innermost."""
    found: dict[str, nn.Module] = {}
    for name, module in tower.named_modules():
        words = name.split(".")
        container = next((w for w in reversed(words) if not w.isdigit()), "")
        if words[-1].isdigit() and CONTAINERS.fullmatch(container):
            found[name] = module
    return {n: m for n, m in found.items() if not any(other.startswith(f"{n}.") for other in found)}


class Recomputed:
    """A block's forward that keeps its input only and runs again in backward (Chen et al. 2016, arXiv:1604.06174)."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns; dropout draws the same mask again."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def recompute(tower: nn.Module, every: bool | int, *, key: str) -> None:  # noqa: FBT001 (as the config has it)
    """Compute each block (True), or the first of every `every` blocks, again in backward; keep its input only.

    Raises:
        ConfigError: the tower has no blocks, or its batch norms would count each batch twice.
    """
    if not every:
        return
    blocks = find(tower)
    if not blocks:
        raise ConfigError(f"{key}: the tower has no repeated blocks to recompute; set it to false")
    for number, (name, block) in enumerate(blocks.items()):
        trains = any(p.requires_grad for p in block.parameters())
        if trains and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in block.modules()):
            raise ConfigError(
                f"{key}: {name} has batch norms, which would count each batch twice; set it to false, or take a tower "
                "with layer norms (a ViT, a ConvNeXt)"
            )
        if number % int(every) == 0:
            block.forward = Recomputed(block.forward)  # type: ignore[method-assign]


def any_recomputed(module: nn.Module) -> bool:
    """Return whether some block of a module is computed again in backward."""
    return any(isinstance(part.forward, Recomputed) for part in module.modules())


def compile_all(module: nn.Module) -> int:
    """Compile every block's forward with torch.compile, inside its recomputation; return how many blocks there are.

    Blocks of one kind share their code, so that compiling takes one block's time, not the depth's.

    Raises:
        ConfigError: there is nothing to compile.
    """
    blocks = find(module)
    if not blocks:
        raise ConfigError("train.compile: the model has no repeated blocks to compile; set it to false")
    for block in blocks.values():
        if isinstance(block.forward, Recomputed):
            block.forward.forward = torch.compile(block.forward.forward)
        else:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    return len(blocks)

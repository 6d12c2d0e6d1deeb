"""AdamW or SGD over named parameter groups: which parameters decay, and how much of the learning rate each layer gets.

    lr of a group = lr of the step (schedules.py) * layer_decay[tower] ** (layers above the group)

Layer-wise decay is that of BEiT and MAE (arXiv:2106.08254, 2111.06377): what lies deep in a pretrained tower moves
less than what lies on top. The module says which parameter lies how deep (`depths`); this file knows no tower.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from pretrain.config import ConfigError, Section
from pretrain.engine import schedules
from pretrain.models.depth import Depth
from pretrain.registry import nearest

WARMUP_LR = 1e-5  # of epoch_cosine
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}  #: what each optimizer keeps of a parameter


class Config(Section):
    """The `optim:` section."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    momentum: float = Field(0.9, gt=0, lt=1)  #: of sgd
    weight_decay: float = Field(0.2, ge=0)  #: beside the gradient with adamw, added to it with sgd
    warmup: int | str = 0  #: steps, or a share of the run such as "5%"
    schedule: schedules.Name = "cosine"
    cooldown: int | str = "20%"  #: of constant_cooldown: steps, or a share of the run
    epoch_steps: float | None = Field(None, gt=0)  #: steps of an epoch, for epoch_cosine; fine-tuning fills it in
    min_lr_ratio: float = Field(0.0, ge=0, le=1)  #: cosine, linear and the cool-down end at lr * min_lr_ratio
    #: tower -> share of the rate that a layer gets of the one above it, e.g. {vision: 0.75, text: 0.9}
    layer_decay: dict[str, float] = Field(default_factory=dict)
    grad_clip: float = Field(1.0, ge=0)  #: norm of the whole gradient; 0 leaves it alone

    @field_validator("warmup", "cooldown")
    @classmethod
    def _length(cls, value: int | str, info: ValidationInfo) -> int | str:
        return schedules.check_length(value, {"warmup": "warm-up", "cooldown": "cool-down"}[str(info.field_name)])

    @field_validator("layer_decay")
    @classmethod
    def _layer_decay(cls, value: dict[str, float]) -> dict[str, float]:
        for tower, decay in value.items():
            if not 0 < decay <= 1:
                raise ValueError(f"{tower}: {decay} is no share of the rate; give a number above 0 and at most 1")
        return value

    def warmup_steps(self, total: int) -> int:
        """Return the length of the warm-up in steps.

        Raises:
            ConfigError: the warm-up does not fit into the run.
        """
        steps = schedules.in_steps(self.warmup, total)
        if steps >= total and steps > 0:
            raise ConfigError(
                f"optim.warmup: {self.warmup} is {steps} steps, the run has {total}; shorten it or write '5%'"
            )
        return steps

    def learning_rate(self, step: int, total: int) -> float:
        """Return the rate of step 0 .. total - 1: lr / warmup first, lr at step warmup - 1, min_lr_ratio * lr last."""
        if self.schedule == "epoch_cosine":
            return self._epoch_cosine(step, total)
        cooldown = schedules.in_steps(self.cooldown, total)
        course = schedules.Course(total, self.warmup_steps(total), cooldown, self.min_lr_ratio)
        return self.lr * schedules.factor(self.schedule, step, course)

    def _epoch_cosine(self, step: int, total: int) -> float:
        """Return CoOp's rate (arXiv:2109.01134): 1e-5 in the first epoch, then a cosine that moves once an epoch."""
        if self.epoch_steps is None:
            raise ConfigError("optim.schedule: epoch_cosine needs optim.epoch_steps; fine-tuning knows it, else set it")
        epoch, epochs = int(step / self.epoch_steps), max(1, round(total / self.epoch_steps))
        return 0.5 * self.lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) if epoch else WARMUP_LR


def groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return named groups: matrices decay; gains, biases and scalars ([1]) do not. Frozen parameters are in none.

    With layer_decay there are two a layer, from the stem up; `lr_scale` is what the group gets of the step's rate.

    Raises:
        ConfigError: a tower that the module does not have.
    """
    depths = _depths(module, config.layer_decay)
    found: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        tower, layer, last = depths.get(name, Depth("", 0, 0))
        matrix = len(getattr(p, "ds_shape", p.shape)) >= 2  # ZeRO-3 may have emptied it already
        label = f"{tower} layer {layer} of {last}" if tower else "the rest" if config.layer_decay else "all"
        group = found.setdefault(
            (tower, layer, not matrix),
            {
                "name": f"{label}, {'decayed' if matrix else 'not decayed'}",
                "params": [],
                "weight_decay": config.weight_decay if matrix else 0.0,
                "lr_scale": config.layer_decay[tower] ** (last - layer) if tower else 1.0,
            },
        )
        group["params"].append(p)
    return [group for _, group in sorted(found.items())]


def _depths(module: nn.Module, decay: Mapping[str, float]) -> dict[str, Depth]:
    """Return where each parameter of a tower with layer decay lies."""
    if not decay:
        return {}
    ask: Any = getattr(module, "depths", dict)
    said: dict[str, Depth] = ask()
    towers = sorted({depth.tower for depth in said.values()})
    for tower in decay:
        if tower not in towers:
            known = f"{nearest(tower, towers)} It has {', '.join(towers)}" if towers else " It has none"
            raise ConfigError(f"optim.layer_decay: the model has no tower {tower!r}.{known}")
    return {name: depth for name, depth in said.items() if depth.tower in decay}


def describe(groups: list[dict[str, Any]]) -> list[str]:
    """Return one line a group for the log: its name, parameters, weight decay and share of the learning rate."""
    return [
        f"parameter group {g['name']}: {sum(getattr(p, 'ds_numel', p.numel()) for p in g['params']):,} parameters, "
        f"weight decay {g['weight_decay']:g}, learning rate x {g['lr_scale']:.4g}"
        for g in groups
    ]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * float(group["lr_scale"])


class SGD(torch.optim.SGD):
    """torch's SGD that counts its updates as AdamW does: a checkpoint tells by them whether there are moments."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient."""
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
        return loss


def build(module: nn.Module, config: Config, *, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer over the trained parameters.

    Raises:
        ConfigError: there is nothing to train.
    """
    found = groups(module, config)
    if not found:
        raise ConfigError("optim: no parameter is trained; unfreeze a part of the model")
    if config.optimizer == "sgd":
        return SGD(found, lr=config.lr, momentum=config.momentum)
    # one pass over weights, gradient and moments instead of a dozen: 5 times as fast on a CPU, where large ones wait
    # for memory. What a plan rehearses on no device at all (meta) is never updated.
    fused = device.type in ("cpu", "cuda") and not any(p.is_meta for group in found for p in group["params"])
    return torch.optim.AdamW(found, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


def warnings(config: Config, *, steps: int, batch_size: int, from_scratch: bool) -> list[str]:
    """Return a sentence for each setting that runs, yet belongs to another kind of run. `--plan` and the log show them.

    Args:
        config: the `optim:` section.
        steps: length of the run.
        batch_size: of all ranks together.
        from_scratch: no part of what trains starts from weights.
    """
    found = []
    try:
        warmup = config.warmup_steps(steps)
    except ConfigError as error:
        return [str(error)]
    if warmup > 0.5 * steps:
        found.append(
            f"optim.warmup: the warm-up takes {warmup} of {steps} steps; CLIP's took 2000 of 400,000. "
            "Most of the run is below the learning rate asked for; write '5%'"
        )
    if config.optimizer == "adamw" and config.lr > 4e-3:
        found.append(
            f"optim.lr: {config.lr:g} is a rate for SGD; AdamW trains CLIP at 5e-4 (batch 32,768) to 1e-3 "
            f"(batch 90,000) and small towers at up to 3e-3, here the batch is {batch_size}"
        )
    if config.optimizer == "sgd" and config.lr < 1e-4:
        found.append(f"optim.lr: {config.lr:g} is a rate for AdamW; SGD hardly moves the weights with it")
    if config.optimizer == "adamw" and from_scratch and 0 < config.lr < 5e-5:
        found.append(f"optim.lr: {config.lr:g} is a rate for fine-tuning, yet all weights start at random")
    if config.layer_decay and from_scratch:
        found.append("optim.layer_decay: the stem moves least, yet all weights start at random; it is for fine-tuning")
    if config.optimizer == "adamw" and config.betas[1] > 0.99 and batch_size >= 16384:
        found.append(
            f"optim.betas: {config.betas[1]} remembers too long for a batch of {batch_size}; CLIP takes 0.98, since "
            "loss spikes come from an outdated second moment (arXiv:2304.13013)"
        )
    return found

"""AdamW or SGD with two parameter groups, and the learning rate as a pure function of the step."""

import math
import re
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from pretrain.config import ConfigError, Section

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
    schedule: Literal["cosine", "constant", "epoch_cosine"] = "cosine"
    epoch_steps: float | None = Field(None, gt=0)  #: steps of an epoch, for epoch_cosine; fine-tuning fills it in
    min_lr_ratio: float = Field(0.0, ge=0, le=1)  #: the cosine ends at lr * min_lr_ratio
    grad_clip: float = Field(1.0, ge=0)  #: norm of the whole gradient; 0 leaves it alone

    @field_validator("warmup")
    @classmethod
    def _warmup(cls, value: int | str) -> int | str:
        if isinstance(value, int):
            if value < 0:
                raise ValueError(f"{value} steps of warm-up; give 0 or more")
            return value
        if not re.fullmatch(r"\d+(\.\d+)?%", value):
            raise ValueError(f"{value!r} is neither a number of steps nor a share like '5%'")
        return value

    def warmup_steps(self, total: int) -> int:
        """Return the length of the warm-up in steps.

        Raises:
            ConfigError: the warm-up does not fit into the run.
        """
        share = isinstance(self.warmup, str)
        steps = round(float(str(self.warmup)[:-1]) / 100 * total) if share else int(self.warmup)
        if steps >= total and steps > 0:
            raise ConfigError(
                f"optim.warmup: {self.warmup} is {steps} steps, the run has {total}; shorten it or write '5%'"
            )
        return steps

    def learning_rate(self, step: int, total: int) -> float:
        """Return the rate of step 0 .. total - 1: lr / warmup first, lr at step warmup - 1, min_lr_ratio * lr last."""
        if self.schedule == "epoch_cosine":
            return self._epoch_cosine(step, total)
        warmup = self.warmup_steps(total)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        # the peak counts as the cosine's start; without warm-up step 0 is the peak
        first = max(warmup - 1, 0)
        progress = (step - first) / max(total - 1 - first, 1)
        low = self.lr * self.min_lr_ratio
        return low + 0.5 * (self.lr - low) * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _epoch_cosine(self, step: int, total: int) -> float:
        """Return CoOp's rate (arXiv:2109.01134): 1e-5 in the first epoch, then a cosine that moves once an epoch."""
        if self.epoch_steps is None:
            raise ConfigError("optim.schedule: epoch_cosine needs optim.epoch_steps; fine-tuning knows it, else set it")
        epoch, epochs = int(step / self.epoch_steps), max(1, round(total / self.epoch_steps))
        return 0.5 * self.lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) if epoch else WARMUP_LR


def groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices decay; gains, biases and scalars ([1]) do not. Frozen parameters are in neither."""
    trained = [p for p in module.parameters() if p.requires_grad]
    split = (
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    )
    return [group for group in split if group["params"]]


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
    found = groups(module, config.weight_decay)
    if not found:
        raise ConfigError("optim: no parameter is trained; unfreeze a part of the model")
    if config.optimizer == "sgd":
        return SGD(found, lr=config.lr, momentum=config.momentum)
    fused = device.type == "cuda"
    return torch.optim.AdamW(found, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)

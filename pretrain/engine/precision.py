"""Half precision as autocast over fp32 parameters, and the loss scale that fp16 needs.

Parameters, gradients and moments stay fp32 at every ZeRO stage; only the arithmetic inside forward is lowered.
DeepSpeed 0.19.8's own `torch_autocast` is not used: with fp16 at stages 1-3 it clips gradients before unscaling
them and never lowers the scale after an overflow (stage_1_and_2.py returns before GradScaler.update). The price: ranks
exchange gradients and ZeRO-3 weights in fp32, and autograd keeps the lowered copies of weights until backward.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.profiler import record_function

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Autocast(nn.Module):
    """The module that DeepSpeed wraps: runs the inner module's forward in the chosen precision."""

    def __init__(self, module: nn.Module, precision: Precision, *, device_type: str) -> None:
        super().__init__()
        self.module = module
        self.precision = precision
        self.device_type = device_type

    def context(self) -> torch.autocast:
        """Return the autocast context of this precision (disabled for fp32)."""
        dtype = DTYPES.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device_type, dtype=dtype, enabled=self.precision in DTYPES)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the inner module returns."""
        with record_function("forward"), self.context():
            return self.module(*args, **kwargs)


class LossScale:
    """fp16's dynamic loss scale: halved after an overflow, doubled after `patience` good steps (Micikevicius 2018)."""

    def __init__(self, *, scale: float = 2.0**16, patience: int = 2000) -> None:
        self.scale = scale
        self.patience = patience
        self.good = 0

    def update(self, *, overflow: bool) -> None:
        """Account for one step."""
        if overflow:
            self.scale, self.good = max(self.scale / 2, 1.0), 0
            return
        self.good += 1
        if self.good == self.patience:
            self.scale, self.good = self.scale * 2, 0

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"scale": self.scale, "good": self.good}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.scale, self.good = float(state["scale"]), int(state["good"])

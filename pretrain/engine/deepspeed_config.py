"""The `zero:` section, and what DeepSpeed is told of it: its own config."""

from typing import Any, Literal

from packaging.version import Version
from pydantic import Field, field_validator, model_validator
from torch import nn

from pretrain.config import ConfigError, Section
from pretrain.models import blocks

#: the first DeepSpeed whose stage 3 computes blocks again where some weights are frozen
RECOMPUTES_FROZEN = Version("0.19.8")
BUCKET = 500_000_000  #: elements of the buffer through which gradients travel, at most; DeepSpeed's own default
OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "torch_autocast",
    "optimizer",
    "scheduler",
)


class Config(Section):
    """The `zero:` section."""

    stage: Literal[0, 1, 2, 3] = 1
    #: what lies in the host's memory: nothing; masters and moments, which the CPU then updates; weights too (stage 3)
    offload: Literal["none", "optimizer", "all"] = "none"
    #: whole: every rank builds the whole model first; parts: shard by shard, with the same weights to the bit (stage 3)
    init: Literal["whole", "parts"] = "whole"
    #: merged into DeepSpeed's own config, e.g. {zero_optimization: {reduce_bucket_size: 50000000}}
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("extra")
    @classmethod
    def _extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        inside = value.get("zero_optimization") or {}
        taken = [key for key in OWNED if key in value]
        taken += [f"zero_optimization.{k}" for k in ("stage", "offload_optimizer", "offload_param") if k in inside]
        if taken:
            raise ValueError(
                f"{taken[0]} is set by train, optim, zero.stage or zero.offload; leave it out of zero.extra"
            )
        return value

    @model_validator(mode="after")
    def _stages(self) -> "Config":
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.stage < least:
            raise ValueError(f"offload: {self.offload!r} needs zero.stage={least} or higher, it is {self.stage}")
        if self.init == "parts" and self.stage < 3:
            raise ValueError(f"init: 'parts' needs zero.stage=3, at stage {self.stage} every rank holds all weights")
        return self


def deepspeed_config(
    config: Config, *, rows: int, grad_clip: float, trained: int = BUCKET, pin: bool = False
) -> dict[str, Any]:
    """Return DeepSpeed's config; `rows` is the batch size of one rank, `pin` locks the pages of what is offloaded.

    `trained` is the number of trained parameters: the buffer of gradients need not be larger, by default it is 2 GB.
    """
    host = {"device": "cpu", "pin_memory": pin}
    offload = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip if config.stage else 0.0,  # stage 0 is clipped here, where its norm is seen
        "zero_optimization": {
            "stage": config.stage,
            "reduce_bucket_size": max(1, min(BUCKET, trained)),
            **dict.fromkeys(offload[config.offload], host),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does as well on a CPU and compiles nothing
        "steps_per_print": 10**12,
    }
    for key, value in config.extra.items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict)
        tree[key] = {**tree[key], **value} if both else value
    return tree


def refuse_lost_shapes(module: nn.Module, stage: int, version: str) -> None:
    """Raise a ConfigError for frozen weights and recomputed blocks at stage 3 of a DeepSpeed that loses their shapes.

    Tried with 0.17.5 to 0.19.7, on torch 2.6: what backward computes again finds weights of no elements.
    """
    frozen = any(not p.requires_grad for p in module.parameters())
    if stage == 3 and frozen and blocks.any_recomputed(module) and Version(version) < RECOMPUTES_FROZEN:
        raise ConfigError(
            f"zero.stage=3: DeepSpeed {version} cannot compute blocks again in a model with frozen weights; install "
            f"DeepSpeed {RECOMPUTES_FROZEN}, set model.vision.checkpointing and model.text.checkpointing to false, or "
            "use another stage"
        )

"""One training engine for ZeRO stages 0-3: DeepSpeed with what its stages lack or do differently evened out.

Facts about DeepSpeed 0.19.8 that shape this file:
- a 0-dim parameter breaks `initialize` at every stage;
- stage 0 in fp32 is plain torch AdamW and does not skip a non-finite gradient, stages 1-3 do: stage 0 does so here;
- fp32 masters live in flat partitions; `fragments` shows them by parameter name, so that a checkpoint knows no stage.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as torch_dist
from packaging.version import Version
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.profiler import record_function

from pretrain import dist
from pretrain.config import ConfigError, Section
from pretrain.engine import deferred, ema, optim, overflow
from pretrain.engine.precision import Autocast, LossScale, Precision
from pretrain.models import blocks

log = logging.getLogger("diptych")
#: the first DeepSpeed whose stage 3 computes blocks again where some weights are frozen
RECOMPUTES_FROZEN = Version("0.19.8")
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


class Fragment(NamedTuple):
    """What this rank holds of one parameter: elements start .. start + weight.numel() of the flattened whole."""

    name: str
    start: int
    weight: Tensor  #: 1-D view of the master weights; writing to it changes the engine (then call `refresh`)
    #: 1-D views of the optimizer's state (none before the first step) and of the average, "ema"; empty for frozen ones
    moments: dict[str, Tensor]
    replicated: bool = False  #: every rank holds the same


BUCKET = 500_000_000  #: elements of the buffer through which gradients travel, at most; DeepSpeed's own default


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


class Engine:
    """A module under DeepSpeed: forward, backward, step, and its state by parameter name."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        *,
        optim_config: optim.Config,
        precision: Precision,
        rows: int,
        device: torch.device,
        keep_frozen: bool = True,
        average: ema.Config | None = None,
        record: deferred.Record | None = None,
    ) -> None:
        """Wrap a module. All ranks call it.

        Args:
            module: what is trained.
            config: the `zero:` section.
            optim_config: the `optim:` section.
            precision: of the arithmetic inside forward.
            rows: batch size of one rank.
            device: of this rank.
            keep_frozen: false leaves what does not train out of `shapes` and `fragments`, and so out of checkpoints.
            average: the `ema:` section.
            record: how the module was built, where it has no weights yet (`zero.init=parts`).
        """
        import deepspeed

        for name, p in module.named_parameters():
            assert p.ndim > 0, f"parameter {name} has no dimension; give it shape [1] (sharding needs one)"
        self.module = module
        self.device = device
        self.stage = config.stage
        self.grad_clip = optim_config.grad_clip
        self.moments = optim.MOMENTS[optim_config.optimizer]
        self.loss_scale = LossScale() if precision == "fp16" else None
        refuse_lost_shapes(module, config.stage, deepspeed.__version__)
        if config.offload != "none" and device.type == "cpu" and dist.is_main():
            log.warning("zero.offload: the device is the host itself; results are the same, no memory is saved")
        #: shapes as they are before ZeRO-3 empties the parameters
        kept = ((name, p) for name, p in module.named_parameters() if keep_frozen or p.requires_grad)
        self.shapes = {name: tuple(p.shape) for name, p in kept}
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        pin = device.type == "cuda"
        tree = deepspeed_config(config, rows=rows, grad_clip=optim_config.grad_clip, trained=trained, pin=pin)
        if record is not None:
            deferred.shard(module, record, tree)
        wrapped = Autocast(module, precision, device_type=device.type).to(device)
        optimizer = optim.build(module, optim_config, device=device)
        self.groups = optim.describe(optimizer.param_groups)  #: a line each; as they are before ZeRO flattens them
        try:
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=wrapped,
                optimizer=optimizer,
                config=tree,
                dist_init_required=False,
            )
        except (ValueError, TypeError) as error:  # pydantic's complaint about zero.extra
            raise ConfigError(f"zero.extra: DeepSpeed refuses it: {error}") from error
        if self.stage:
            overflow.skip_on_all_ranks(self._optimizer, self.stage)
        self.average = ema.Average(average, self._masters()) if average and average.decay else None
        self._averaged = False  #: the module has the average now
        self._fresh = True  #: no backward since the last step

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer below ZeRO's wrapper (stage 0 has none)."""
        inner: torch.optim.Optimizer = self._optimizer.optimizer if self.stage else self._optimizer
        return inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's forward returns, in the chosen precision."""
        return self._deepspeed(*args, **kwargs)

    @record_function("backward")
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add to the gradients; with the `last` loss of a step they are averaged over ranks.

        Those of a loss that is not finite are not-a-number.
        """
        if self._fresh and self.stage == 3:
            # what no backward of a step touches would keep the gradient of another step
            for part in vars(self._optimizer)["_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"].values():
                part.zero_()
        self._fresh = False
        self._deepspeed.set_gradient_accumulation_boundary(last)
        # such a loss may have finite gradients: the step must be skipped on all ranks all the same
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, float("nan")).to(loss.dtype)
        if self.loss_scale is not None:
            if self.stage:
                self._optimizer.override_loss_scale(self.loss_scale.scale)
            else:
                loss = loss * self.loss_scale.scale
        self._deepspeed.backward(loss)

    @record_function("optimizer")
    def step(self, lr: float, *, broken: bool = False) -> float:
        """Update the weights; return the gradient's norm before clipping.

        A norm that is not finite means that the step was skipped on all ranks and no weight changed. `broken` says that
        the loss of some rank was not finite, which is no reason to lower the loss scale.
        """
        self._fresh = True
        optim.set_rate(self.torch_optimizer, lr)
        if self.stage:
            self._deepspeed.step()
            skipped = bool(self._optimizer.overflow)
            norm = float("inf") if skipped else float(self._deepspeed.get_global_grad_norm())
        else:
            norm = self._clip()
            skipped = not norm < float("inf")
            if skipped:
                self._deepspeed.zero_grad()
            else:
                self._deepspeed.step()
        if self.loss_scale is not None and not broken:
            self.loss_scale.update(overflow=skipped)
        if self.average and not skipped:
            first = next(iter(self.torch_optimizer.state.values()))  # all count alike
            self.average.update(self._masters(), int(first["step"]))
        return float("inf") if skipped else norm

    def _clip(self) -> float:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(grads, 1.0 / self.loss_scale.scale)
        norms = torch._foreach_norm(grads)
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))  # averaged over ranks already: equal on all
        if self.grad_clip and norm > self.grad_clip:
            torch._foreach_mul_(grads, self.grad_clip / (norm + 1e-6))
        return norm

    def gathered(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Return a context in which these parameters are whole at stage 3 too, to be read outside forward."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), enabled=self.stage == 3 and bool(parameters))

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the module in eval mode, without gradients, in fp32 (as evaluate.py runs it); any method may be called.

        Where there is an average, the module has its weights. At stage 3 a submodule gathers its weights when called;
        what belongs to a module with children (a class token, a scale) is gathered here, since a method other than
        forward fires no hook. All ranks call it.
        """
        was_training = self.module.training
        loose = [p for m in self.module.modules() if next(m.children(), None) for p in m.parameters(recurse=False)]
        with self.averaged():
            self.module.eval()
            try:
                with torch.no_grad(), self.gathered(loose):
                    yield self.module
            finally:
                self.module.train(was_training)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the module the weights of the average, where there is one; inside another such context do nothing.

        All ranks call it.
        """
        if self.average is None or self._averaged:
            yield
            return
        self._exchange(self.average)
        yield
        self._exchange(self.average)  # not after an error: it waits for all ranks, and training is over

    def _exchange(self, average: ema.Average) -> None:
        average.exchange(self._masters())
        self.refresh()
        self._averaged = not self._averaged

    # -- state by name ---------------------------------------------------------------------------------------------

    def optimizer_step(self) -> int:
        """Return how many updates AdamW has made (skipped steps do not count)."""
        steps = [int(s["step"]) for s in self.torch_optimizer.state.values() if "step" in s]
        return max(steps, default=0)

    def make_moments(self, optimizer_step: int) -> None:
        """Create zeroed moments, as after `optimizer_step` updates, so that `fragments` can show them."""
        flats = self._masters()
        fused = bool(self.torch_optimizer.defaults.get("fused"))
        for flat in flats:
            where = flat.device if fused else "cpu"
            self.torch_optimizer.state[flat] = {
                # one tensor each: AdamW counts in place
                "step": torch.tensor(float(optimizer_step), dtype=torch.float32, device=where),
                **{name: torch.zeros_like(flat.data) for name in self.moments},
            }

    def _masters(self) -> list[Tensor]:
        """Return the tensors that the optimizer updates: flat partitions, at stage 0 the trained parameters."""
        return self._flats() if self.stage else [p for p in self.module.parameters() if p.requires_grad]

    def _flats(self) -> list[Tensor]:
        z = self._optimizer
        found: list[Tensor] = z.fp32_partitioned_groups_flat if self.stage == 3 else z.single_partition_of_fp32_groups
        return found

    def fragments(self) -> list[Fragment]:
        """Return views of all that this rank holds: masters and moments of trained parameters, kept frozen weights."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        kept = {name: p for name, p in self.module.named_parameters() if name in self.shapes}
        frozen = [p for p in kept.values() if not p.requires_grad]
        if self.stage == 3:
            return [*self._sharded(names), *(_frozen_shard(names[id(p)], p) for p in frozen)]
        whole = frozen if self.stage else list(kept.values())
        out = [
            Fragment(names[id(p)], 0, p.data.view(-1), self._moments(p, 0, p.numel()), replicated=True) for p in whole
        ]
        return [*self._partitioned(names), *out] if self.stage else out

    def _moments(self, key: Tensor, start: int, numel: int) -> dict[str, Tensor]:
        state = dict(self.torch_optimizer.state.get(key, {}))  # type: ignore[call-overload]
        average = self.average.part(key) if self.average else None
        if average is not None:
            state["ema"] = average
        return {k: v.view(-1)[start : start + numel] for k, v in state.items() if k != "step"}

    def _partitioned(self, names: dict[int, str]) -> Iterator[Fragment]:
        for flat, group in zip(self._flats(), self._optimizer.bit16_groups):
            for p in group:
                if p._hp_mapping is not None:  # this rank's partition touches the parameter
                    mine, whole = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                    view = flat.data[mine.start : mine.start + mine.numel]
                    yield Fragment(names[id(p)], whole.start, view, self._moments(flat, mine.start, mine.numel))

    def _sharded(self, names: dict[int, str]) -> Iterator[Fragment]:
        z = self._optimizer
        for flat, group in zip(self._flats(), z.fp16_groups):
            for p in group:
                _, at, size = z.grad_position[z.get_param_id(p)]
                start, numel = _slice(p, size)
                if numel:
                    view = flat.data[at : at + numel]
                    yield Fragment(names[id(p)], start, view, self._moments(flat, at, numel))

    def refresh(self) -> None:
        """Bring the working weights in line with the masters after `fragments` were written to. All ranks call it."""
        z = self._optimizer
        if self.stage in (1, 2):
            z.update_lp_params()
        elif self.stage == 3:
            for i in range(len(z.fp16_groups)):
                z._reassign_or_swap_out_partitioned_parameters(i)
            if z.persistent_parameters:  # small ones stay gathered: drop the stale copies, gather again
                z.persistent_parameters[0].partition(z.persistent_parameters)
                z.persistent_parameters[0].all_gather(z.persistent_parameters)

    def close(self) -> None:
        """Remove DeepSpeed's hooks, so that the module and the process can be used again."""
        self._deepspeed.destroy()


def _slice(p: Any, size: int) -> tuple[int, int]:
    """Return (start, length) of this rank's part of a ZeRO-3 parameter whose parts have `size` (the last is padded)."""
    start = torch_dist.get_rank(p.ds_process_group) * size if dist.world() > 1 else 0
    return start, max(0, min(size, p.ds_numel - start))


def _frozen_shard(name: str, p: Any) -> Fragment:
    start, numel = _slice(p, p.ds_tensor.numel())
    return Fragment(name, start, p.ds_tensor.data.view(-1)[:numel], {})

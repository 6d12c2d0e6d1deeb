"""One training engine for ZeRO stages 0-3: DeepSpeed with what its stages lack or do differently evened out.

Facts about DeepSpeed 0.19.8 that shape this file:
- a 0-dim parameter breaks `initialize` at every stage;
- stage 0 in fp32 is plain torch AdamW and does not skip a non-finite gradient, stages 1-3 do: stage 0 does so here;
- fp32 masters live in flat partitions: fragments.py shows them by parameter name.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.engine import deferred, ema, optim, overflow
from pretrain.engine.deepspeed_config import Config, deepspeed_config, refuse_lost_shapes
from pretrain.engine.fragments import Fragment, Fragments
from pretrain.engine.precision import Autocast, LossScale, Precision
from pretrain.engine.reduction import Reduction

log = logging.getLogger("diptych")


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

        self.module = module
        self.device = device
        self.stage = config.stage
        self.grad_clip = optim_config.grad_clip
        self.loss_scale = LossScale() if precision == "fp16" else None
        _look_over(module, config, device, version=deepspeed.__version__)
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
        self.reduction: Reduction | None = None
        if self.stage:
            overflow.skip_on_all_ranks(self._optimizer, self.stage)
        else:
            self._deepspeed.enable_backward_allreduce = False
            self.reduction = Reduction([p for p in module.parameters() if p.requires_grad])
        self.state = Fragments(
            module,
            self._optimizer,
            stage=self.stage,
            names=self.shapes,
            moments=optim.MOMENTS[optim_config.optimizer],
            average=average,
        )
        self._averaged = False  #: the module has the average now
        self._fresh = True  #: no backward since the last step

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
        if self.reduction and last:
            self.reduction.begin()
        self._deepspeed.backward(loss)
        if self.reduction and last:
            self.reduction.finish()

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
        if not skipped:
            self.state.follow()
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
        if self.state.average is None or self._averaged:
            yield
            return
        self._exchange()
        yield
        self._exchange()  # not after an error: it waits for all ranks, and training is over

    def _exchange(self) -> None:
        self.state.exchange()
        self._averaged = not self._averaged

    def fragments(self) -> list[Fragment]:
        """Return views of all that this rank holds; what is written to them needs a `state.refresh`."""
        return self.state.all()

    def optimizer_step(self) -> int:
        """Return how many updates the optimizer has made (skipped steps do not count)."""
        return self.state.optimizer_step()

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer below ZeRO's wrapper."""
        return self.state.torch_optimizer

    def close(self) -> None:
        """Remove DeepSpeed's hooks, so that the module and the process can be used again."""
        if self.reduction:
            self.reduction.close()
        self._deepspeed.destroy()


def _look_over(module: nn.Module, config: Config, device: torch.device, *, version: str) -> None:
    """Refuse, or warn of, what DeepSpeed would stumble over or do to no purpose."""
    for name, p in module.named_parameters():
        assert p.ndim > 0, f"parameter {name} has no dimension; give it shape [1] (sharding needs one)"
    refuse_lost_shapes(module, config.stage, version)
    if config.offload != "none" and device.type == "cpu" and dist.is_main():
        log.warning("zero.offload: the device is the host itself; results are the same, no memory is saved")

"""A step in micro-batches whose gradient is that of the whole batch, also where rows are compared with each other.

A loss that compares rows of the whole batch is no sum over micro-batches. Its features are: so each micro-batch is run
without gradient, the loss and dL/dfeatures are taken once from all features (of all ranks), and each micro-batch is run
again with the same draws and pulled at with <features, dL/dfeatures>, whose gradient is the step's (GradCache, Gao et
al. 2021, arXiv:2101.06983). Memory is that of one micro-batch and all features; the price is a second forward.
What the loss itself learns (temperature, bias) gets its gradient from the one loss, a k-th of it with each of the k
micro-batches: every backward then touches the same parameters, and DeepSpeed sees nothing but k backwards and one step.

Losses that are sums over rows, divided by what the whole step counts, go with the second forward; where nothing
compares rows there is no first one.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.engine.zero import Engine

Logs = dict[str, Tensor]
T = TypeVar("T")


@runtime_checkable
class Accumulable(Protocol):
    """What a module offers beside its forward, so that its steps can be cut into micro-batches.

    `forward(batches, prepared=...)` returns (loss, logs) of these batches alone; with want="features" a dict of
    features [rows, ...], whose rows are not yet compared; with `pull` (gradients of the features and of the `head`) the
    sums over rows plus a term of value zero that has these gradients.
    """

    def prepare(self, batches: list[Batch], step: int) -> list[Any]:
        """Return for each batch what was drawn for it and what the whole step counts. All ranks call it."""

    def whole(self) -> list[str]:
        """Return what can only be trained on whole batches, as its names in a config."""

    def contrasts(self) -> bool:
        """Return whether some loss compares rows."""

    def head(self) -> list[nn.Parameter]:
        """Return the trained parameters that `contrast` reads."""

    def contrast(self, features: dict[str, Tensor]) -> tuple[Tensor, Logs]:
        """Return loss and scalars of what compares rows, from the features of all rows of this rank."""


def refuse(module: nn.Module) -> None:
    """Raise a ConfigError where a module cannot be trained in micro-batches."""
    if not isinstance(module, Accumulable):
        raise ConfigError(f"train.micro_batch_size: {type(module).__name__} takes its batch whole; leave the key out")
    if names := module.whole():
        raise ConfigError(f"train.micro_batch_size: {', '.join(names)} cannot be computed in parts; leave the key out")
    module.train()
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            raise ConfigError(
                f"train.micro_batch_size: {name} is a batch norm, whose statistics would be those of a micro-batch; "
                "choose a tower without batch norm, freeze it, or leave the key out"
            )


class Steps:
    """Forward and backward of whole steps; the engine's `step` is the caller's."""

    def __init__(self, engine: Engine, *, rows: int | None, seed: int) -> None:
        """`rows` of this rank go through the module at once; None: all of them."""
        self.engine, self.rows, self.seed = engine, rows, seed
        if rows is not None:
            refuse(engine.module)

    def __call__(self, batch: Batch, step: int, known: Callable[[Tensor], T]) -> tuple[Logs, T]:
        """Compute the gradients of step `step`; return its scalars, and what `known` made of the loss.

        `known` is called with this rank's loss of the whole step, before the last backward.
        """
        batches = [part.to(self.engine.device) for part in batch.split(self.rows)]
        module: Any = self.engine.module
        prepared = module.prepare(batches, step) if isinstance(module, Accumulable) else None
        if len(batches) > 1 and self.rows is not None:
            assert prepared is not None, "refused when it was made"
            return self._in_parts(module, batches, prepared, step, known)
        dist.seed_step(self.seed, step, dist.rank())
        loss, logs = self.engine(batches) if prepared is None else self.engine(batches, prepared=prepared)
        found = known(loss)
        self.engine.backward(loss)
        return logs, found

    def _in_parts(
        self, module: Accumulable, batches: list[Batch], prepared: list[Any], step: int, known: Callable[[Tensor], T]
    ) -> tuple[Logs, T]:
        total = torch.zeros((), device=self.engine.device)
        logs: Logs = {}
        pulls: list[Any] = [{} for _ in batches]
        head: list[Tensor | None] = []
        if module.contrasts():
            parts = []
            for index, batch in enumerate(batches):
                self._seed(step, index)
                with torch.no_grad():
                    parts.append(self.engine([batch], prepared=[prepared[index]], want="features"))
            total, logs, pulls, head = self._pull(module, parts)
        for index, batch in enumerate(batches):
            self._seed(step, index)
            loss, scalars = self.engine([batch], prepared=[prepared[index]], pull=(pulls[index], head))
            total = total + loss.detach()
            logs = logs | {name: value + logs.get(name, 0) for name, value in scalars.items()}
            last = index + 1 == len(batches)
            found = known(total) if last else None
            # a step whose loss is not finite is broken, whatever the gradients of its parts are
            self.engine.backward(loss + 0 * total if last else loss, last=last)
        return logs, found  # type: ignore[return-value]  # the last turn set it

    def _seed(self, step: int, index: int) -> None:
        dist.seed_step(self.seed, step, dist.rank(), index)  # dropout: the second forward sees the masks of the first

    def _pull(self, module: Accumulable, parts: list[dict[str, Tensor]]) -> tuple[Tensor, Logs, list[Any], list[Any]]:
        """Return the loss from all features, its scalars, and its gradients by micro-batch and for the head."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        learnt = [name for name, value in whole.items() if value.is_floating_point()]
        for name in learnt:
            whole[name].requires_grad_()
        head = module.head()
        with self.engine.gathered(head):
            loss, logs = module.contrast(whole)
            grads = torch.autograd.grad(loss, [*(whole[name] for name in learnt), *head], allow_unused=True)
        pulls: list[dict[str, Tensor]] = [{} for _ in parts]
        for name, grad in zip(learnt, grads):
            if grad is not None:
                rows = grad.split([len(part[name]) for part in parts])
                for pull, piece in zip(pulls, rows):
                    pull[name] = piece
        return loss.detach(), logs, pulls, list(grads[len(learnt) :])

"""State by parameter name, whatever the stage: views of what this rank holds of weights, moments and the average.

fp32 masters live in flat partitions of DeepSpeed's optimizer at stages 1 to 3, and are the parameters themselves at
stage 0. A checkpoint that is written and read through these views knows no stage.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from pretrain import dist
from pretrain.engine import ema


class Fragment(NamedTuple):
    """What this rank holds of one parameter: elements start .. start + weight.numel() of the flattened whole."""

    name: str
    start: int
    weight: Tensor  #: 1-D view of the master weights; writing to it changes the engine (then call `refresh`)
    #: 1-D views of the optimizer's state (none before the first step) and of the average, "ema"; empty for frozen ones
    moments: dict[str, Tensor]
    replicated: bool = False  #: every rank holds the same


class Fragments:
    """The parts of a module's state that this rank holds under DeepSpeed."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        *,
        stage: int,
        names: Collection[str],
        moments: Sequence[str],
        average: ema.Config | None,
    ) -> None:
        """Find the masters; an average starts from them as they are.

        Args:
            module: what is trained, after `deepspeed.initialize`.
            optimizer: what DeepSpeed has made of the torch optimizer.
            stage: of ZeRO.
            names: the parameters that are shown.
            moments: names of the optimizer's state of a parameter, without its step.
            average: the `ema:` section.
        """
        self.module = module
        self.stage = stage
        self.names = names
        self.moments = moments
        self._optimizer = optimizer
        self.average = ema.Average(average, self.masters()) if average and average.decay else None

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer below ZeRO's wrapper (stage 0 has none)."""
        inner: torch.optim.Optimizer = self._optimizer.optimizer if self.stage else self._optimizer
        return inner

    def all(self) -> list[Fragment]:
        """Return views of all that this rank holds: masters and moments of trained parameters, kept frozen weights."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        kept = {name: p for name, p in self.module.named_parameters() if name in self.names}
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

    def optimizer_step(self) -> int:
        """Return how many updates AdamW has made (skipped steps do not count)."""
        steps = [int(s["step"]) for s in self.torch_optimizer.state.values() if "step" in s]
        return max(steps, default=0)

    def make_moments(self, optimizer_step: int) -> None:
        """Create zeroed moments, as after `optimizer_step` updates, so that `all` can show them."""
        fused = bool(self.torch_optimizer.defaults.get("fused"))
        for flat in self.masters():
            where = flat.device if fused else "cpu"
            self.torch_optimizer.state[flat] = {
                # one tensor each: AdamW counts in place
                "step": torch.tensor(float(optimizer_step), dtype=torch.float32, device=where),
                **{name: torch.zeros_like(flat.data) for name in self.moments},
            }

    def masters(self) -> list[Tensor]:
        """Return the tensors that the optimizer updates: flat partitions, at stage 0 the trained parameters."""
        return self._flats() if self.stage else [p for p in self.module.parameters() if p.requires_grad]

    def _flats(self) -> list[Tensor]:
        z = self._optimizer
        found: list[Tensor] = z.fp32_partitioned_groups_flat if self.stage == 3 else z.single_partition_of_fp32_groups
        return found

    def follow(self) -> None:
        """Take the masters into the average after an update, where one is kept and it is due."""
        if self.average:
            first = next(iter(self.torch_optimizer.state.values()))  # all count alike
            self.average.update(self.masters(), int(first["step"]))

    def exchange(self) -> None:
        """Put the average, where one is kept, in the place of the weights, and them in its. All ranks call it."""
        if self.average:
            self.average.exchange(self.masters())
            self.refresh()

    def refresh(self) -> None:
        """Bring the working weights in line with the masters after fragments were written to. All ranks call it."""
        z = self._optimizer
        if self.stage in (1, 2):
            z.update_lp_params()
        elif self.stage == 3:
            for i in range(len(z.fp16_groups)):
                z._reassign_or_swap_out_partitioned_parameters(i)
            if z.persistent_parameters:  # small ones stay gathered: drop the stale copies, gather again
                z.persistent_parameters[0].partition(z.persistent_parameters)
                z.persistent_parameters[0].all_gather(z.persistent_parameters)


def _slice(p: Any, size: int) -> tuple[int, int]:
    """Return (start, length) of this rank's part of a ZeRO-3 parameter whose parts have `size` (the last is padded)."""
    start = torch_dist.get_rank(p.ds_process_group) * size if dist.world() > 1 else 0
    return start, max(0, min(size, p.ds_numel - start))


def _frozen_shard(name: str, p: Any) -> Fragment:
    start, numel = _slice(p, p.ds_tensor.numel())
    return Fragment(name, start, p.ds_tensor.data.view(-1)[:numel], {})

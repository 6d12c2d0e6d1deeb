"""Gradients of stage 0, averaged over the ranks while backward still runs; DeepSpeed's own stage 0 waits for its end.

Large gradients travel by themselves, in place, small ones together at the end. All ranks send in one order, whatever
becomes ready when: at first from the last parameter to the first, then as rank 0 has seen gradients become ready. They
go through the group of all ranks, as those of DistributedDataParallel do: what losses send in backward, all ranks must
send at the same place of the graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from pretrain import dist

LARGE = 2**16  #: elements; a smaller gradient is not worth a message of its own


class Reduction:
    """Averages the gradients of some parameters. All ranks call each method alike."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch parameters; nothing is sent before `begin`."""
        self.parameters = list(parameters)
        self.large = [p for p in reversed(self.parameters) if p.numel() >= LARGE and p.is_contiguous()]
        apart = {id(p) for p in self.large}
        self.small = [p for p in self.parameters if id(p) not in apart]
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda _, number=number: self._ready(number))
            for number, p in enumerate(self.large)
        ]
        self._order = list(range(len(self.large)))  #: in which they are sent
        self._learnt = False
        self._open = False
        self._seen: dict[int, None] = {}  #: ready, in the order of this rank
        self._sent: list[Any] = []

    def begin(self) -> None:
        """Say that the backward that follows is the last one of its step."""
        self._seen, self._open = {}, True

    def _ready(self, number: int) -> None:
        if not self._open or dist.world() == 1:
            return
        self._seen[number] = None
        while len(self._sent) < len(self._order) and self._order[len(self._sent)] in self._seen:
            self._send(self.large[self._order[len(self._sent)]])

    def _send(self, p: nn.Parameter) -> None:
        assert p.grad is not None, "it is ready"
        self._sent.append(torch_dist.all_reduce(p.grad, async_op=True))

    def finish(self) -> None:
        """Send what is left and wait for all; a parameter that no backward has reached has a gradient of zeros."""
        self._open = False
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if dist.world() == 1:
            return
        for number in self._order[len(self._sent) :]:
            self._send(self.large[number])
        grads = [p.grad for p in self.small if p.grad is not None]
        if grads:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            torch_dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])
        for work in self._sent:
            work.wait()
        self._sent = []
        every: list[Tensor] = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(every, 1.0 / dist.world())
        if not self._learnt:
            self._order = dist.broadcast_object(list(self._seen | dict.fromkeys(self._order)))
            self._learnt = True

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

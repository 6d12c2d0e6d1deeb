"""One training step on tensors without contents: what it would hold in memory, and how much it computes.

Weights are built on the meta device and turned into fake CPU tensors, whose operators know shapes and storages but
compute nothing. Forward and backward run as in training, under autocast, and a mode follows each storage from the
operator that makes it to its end. So recomputation, frozen towers, patch dropout or a new objective need no formula.
What DeepSpeed adds around it is counted in memory.py.

Attention is counted as a fused kernel, as both CPUs and GPUs run it.
Shapes: N = images, B = rows, T = tokens, K = boxes, C = numbers of a box's feature.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pretrain import recipe as recipes
from pretrain.batch import Batch
from pretrain.engine import optim
from pretrain.engine.precision import Autocast
from pretrain.models import base as models
from pretrain.objectives import base as objectives


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, now and at most."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        """Count none of what was there `before`: an operator that works in place returns it, too."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {value.untyped_storage()._cdata: 0 for value in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Step:
    """What one step of one rank needs; bytes, and floating-point operations."""

    rows: int
    parts: dict[str, int]  #: parameters of each child of the model
    trained: int  #: parameters with a gradient
    frozen: int
    largest: int  #: parameters of the largest tensor that trains
    group: int  #: parameters of the largest group of the optimizer
    buffers: int  #: bytes of buffers
    batch: int  #: bytes of the batch on the device
    forward: int  #: most bytes during forward, beside the weights and the batch
    kept: int  #: bytes that backward needs, alive when forward ends
    peak: int  #: most bytes during forward and backward, gradients included, beside the weights and the batch
    flops: float  #: of a sample, forward and backward; what is computed twice counts once


def made_up_batch(
    rows: int, *, size: int, length: int, written: int | None = None, regions: tuple[int, int] | None = None
) -> Batch:
    """Return a batch of the right shapes, to be called under a fake mode.

    `written` are the tokens of a decoder, `regions` the boxes of a row and the numbers of a box's feature.
    """
    boxes, width = regions or (0, 0)
    draw_B = torch.zeros(rows, dtype=torch.long)
    tokens_BT = torch.zeros(rows, length, dtype=torch.long)
    return Batch(
        keys=[str(n) for n in range(rows)],
        image_NCHW=torch.zeros(rows, 3, size, size, dtype=torch.uint8),
        owner_N=torch.arange(rows),
        tokens_BT=tokens_BT,
        blocks_BT=torch.zeros_like(tokens_BT),
        valid_BT=torch.zeros(rows, length, dtype=torch.bool),
        labels_BT=torch.zeros_like(tokens_BT),
        caption_B=torch.zeros_like(draw_B),
        draw_B=draw_B,
        decoder_tokens_BU=None if written is None else torch.zeros(rows, written, dtype=torch.long),
        decoder_labels_BU=None if written is None else torch.zeros(rows, written, dtype=torch.long),
        boxes_K4=torch.zeros(rows * boxes, 4) if regions else None,
        box_owner_K=torch.arange(rows).repeat_interleave(boxes) if regions else None,
        region_KC=torch.zeros(rows * boxes, width) if regions else None,
    )


@contextmanager
def hollow(recipe: recipes.Recipe, words: models.Vocabulary) -> Iterator[nn.Module]:
    """Yield model and objectives as fake CPU tensors, inside the mode that they need.

    Raises:
        ConfigError: what the objectives need, the model does not provide.
    """
    objectives.refuse_unserved(recipe.objectives, recipes.model_class(recipe.model).provides)
    with torch.device("meta"):
        mixture = objectives.build(recipe.objectives, recipes.model_class(recipe.model).build(recipe.model, words))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            mixture.to_empty(device="cpu")
            yield mixture
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def rehearse(recipe: recipes.Recipe, words: models.Vocabulary, *, rows: int, length: int) -> Step:
    """Return what a step of `rows` rows with texts of `length` tokens needs on one rank.

    Nothing is allocated; the random state stays as it is.

    Raises:
        ConfigError: a model or an objective that cannot be built.
    """
    state = torch.get_rng_state()
    try:
        with hollow(recipe, words) as mixture:
            return _rehearse(recipe, mixture, rows=rows, length=length)
    finally:
        torch.set_rng_state(state)


def _rehearse(recipe: recipes.Recipe, mixture: nn.Module, *, rows: int, length: int) -> Step:
    trained = [p.numel() for p in mixture.parameters() if p.requires_grad]
    groups = optim.build(mixture, recipe.optim, device=torch.device("cpu")).param_groups
    model = mixture.model
    section = recipe.model
    batch = made_up_batch(
        rows, size=section.look.size, length=length, written=section.lengths[1], regions=section.regions
    )
    wrapped = Autocast(mixture, recipe.train.precision, device_type="cpu").train()
    live, flops = LiveBytes(mixture.buffers()), flop_counter()
    with flops, live:
        loss, _ = wrapped([batch])
        kept, forward, once = live.now, live.peak, flops.get_total_flops()
        loss.backward()
    return Step(
        rows=rows,
        parts={name: count for name, child in model.named_children() if (count := numbers(child))},
        trained=sum(trained),
        frozen=numbers(mixture) - sum(trained),
        largest=max(trained, default=0),
        group=max(sum(p.numel() for p in group["params"]) for group in groups),
        buffers=sum(b.numel() * b.element_size() for b in mixture.buffers()),
        batch=sum(t.numel() * t.element_size() for t in batch.tensors().values()),
        forward=forward,
        kept=kept,
        peak=live.peak,
        flops=min(flops.get_total_flops(), 3 * once) / rows,
    )


def numbers(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, taught the CPU's fused attention; a multiplication and an addition are two."""
    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )

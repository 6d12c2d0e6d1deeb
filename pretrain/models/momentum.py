"""A second pair of towers that trails the model's: each of its weights is a moving average of the model's own.

    p_m <- m p_m + (1 - m) p          (MoCo, He et al. 2020, arXiv:1911.05722, equation 2; ALBEF, section 3.2)

Its weights are buffers, not parameters: the optimizer does not see them, ZeRO-3 leaves them whole on every rank, and
checkpoints keep them as they keep the statistics of a batch norm. It is in eval mode at all times, so what it makes of
a row depends on weights and row alone (ALBEF leaves dropout on). A picture tower of which nothing but the projection
trains (LiT) is not copied: the model's own output before the projection serves both.

Shapes: N = images, B = rows, E = joint embedding width.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.vlm import VLM, Encodings

GATHERED = 2**26  #: elements of a sharded model's weights that are whole at a time


class MomentumTowers(nn.Module):
    """What makes the image and text features of a model, as it was on average; `follow` first gives it weights."""

    def __init__(self, model: VLM) -> None:
        """Take the form of a model's towers, not yet their weights."""
        super().__init__()
        trained = [name for name, p in model.vision.named_parameters() if p.requires_grad]
        self.locked = all(name.startswith("projection.") for name in trained)  #: only the projection is copied
        image = {"vision.projection": model.vision.projection} if self.locked else {"vision": model.vision}
        self._of: dict[str, str] = {}  # a buffer's name here -> the parameter's or buffer's in the model
        for place, part in {**image, "text": model.text}.items():
            name = place.replace(".", "_")
            setattr(self, name, trailing(part))
            self._of |= {f"{name}.{key}": f"{place}.{key}" for key, _ in getattr(self, name).named_buffers()}
        self.eval()

    def train(self, mode: bool = True) -> "MomentumTowers":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Stay in eval mode."""
        return super().train(mode=False)

    @torch.no_grad()
    def follow(self, model: VLM, momentum: float) -> None:
        """Move towards the weights that the model has now; with momentum 0 take them as they are.

        Running statistics are taken as they are. At ZeRO stage 3 weights are gathered, some at a time: all ranks call
        it, outside forward.
        """
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        pairs = []
        for name, theirs in self._of.items():
            if theirs in buffers:
                self.get_buffer(name).copy_(buffers[theirs])
            elif momentum == 0 or weights[theirs].requires_grad:
                pairs.append((self.get_buffer(name), weights[theirs]))
        for some in _portions(pairs):
            with _whole([theirs for _, theirs in some]):
                torch._foreach_lerp_([ours for ours, _ in some], [p.detach() for _, p in some], 1 - momentum)

    @torch.no_grad()
    def sides(self, encodings: Encodings) -> tuple[Tensor, Tensor]:
        """Return unit-norm image features [N, E] and text features [B, E] of the rows that the model encodes."""
        mine = Encodings(self, encodings.batch)  # type: ignore[arg-type]  # asks for vision and text, no more
        if not self.locked:
            return mine.image, mine.text
        if encodings.batch.image_NE is not None:
            return encodings.image.detach(), mine.text
        return F.normalize(self.vision_projection(encodings.pooled.detach()).float(), dim=-1), mine.text


def trailing(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters are buffers of zeros; ties stay ties."""
    # deepcopy finds these in its memo and copies no weight. They do not refer to the parameters, so that a model built
    # in parts (engine/deferred.py) need not hold these until here
    zeros = {id(p): torch.zeros(p.shape, dtype=p.dtype) for p in module.parameters()}
    memo: dict[int, Tensor] = dict(zeros)
    made = copy.deepcopy(module, memo)
    for part in made.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                del part._parameters[name]
                part.register_buffer(name, value)
    return made


def _portions(pairs: list[tuple[Tensor, nn.Parameter]]) -> Iterator[list[tuple[Tensor, nn.Parameter]]]:
    """Yield all pairs, so many at a time that their weights stay below GATHERED, or one."""
    some: list[tuple[Tensor, nn.Parameter]] = []
    size = 0
    for pair in pairs:
        size += pair[0].numel()
        if some and size > GATHERED:
            yield some
            some, size = [], pair[0].numel()
        some.append(pair)
    if some:
        yield some


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """Return a context in which parameters that ZeRO-3 has sharded are whole."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    found: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameters)
    return found

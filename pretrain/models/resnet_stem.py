"""The first three stages of a ResNet v1.5 as an image stem: stride 16, names as torchvision and timm have them.

He et al. 2016 (arXiv:1512.03385); "v1.5" strides in the 3x3 convolution. OFA reads its grid as image tokens. Batch
norms are `plain` (statistics of a rank's rows), `sync` (of all ranks' rows) or `frozen` (those of the weights that were
read, never updated).

Shapes: N = images, C H W = channels, height, width.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import dist
from pretrain.config import ConfigError

BLOCKS = {"resnet50": (3, 4, 6), "resnet101": (3, 4, 23), "resnet152": (3, 8, 36)}
STRIDE = 16
EXPANSION = 4
Norm = Literal["plain", "sync", "frozen"]


class BatchNorm(nn.BatchNorm2d):
    """A batch norm that a stand-in for missing pictures passes through as in evaluation: nothing counts it."""

    counted = True  #: set by the stem for the pass that follows

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return x, normalised by its own mean and variance in training."""
        if self.counted:
            return super().forward(x_NCHW)
        return F.batch_norm(x_NCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class FrozenBatchNorm(BatchNorm):
    """A batch norm that is a fixed affine map: all four of its vectors are buffers, in training too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for name in ("weight", "bias"):
            value = getattr(self, name).detach().clone()
            delattr(self, name)
            self.register_buffer(name, value)
        super().train(mode=False)

    def train(self, mode: bool = True) -> "FrozenBatchNorm":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Stay in eval mode."""
        return super().train(mode=False)  # type: ignore[return-value]


class SyncBatchNorm(BatchNorm):
    """A batch norm over the pictures of all ranks, however many each has; torch's own needs a GPU."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return x, normalised by the mean and variance of all ranks; gradients flow to the pictures of every rank."""
        if not self.training or dist.world() == 1:
            return super().forward(x_NCHW)
        assert self.running_mean is not None and self.running_var is not None
        x = x_NCHW.float() if x_NCHW.dtype in (torch.float16, torch.bfloat16) else x_NCHW
        count_1 = x.new_full((1,), float(self.counted) * x.numel() / x.shape[1])
        both = dist.gather_with_grad(torch.cat([x.sum((0, 2, 3)) * self.counted, count_1])[None]).sum(0)
        total = both[-1:].detach()
        some, divisor = total > 0, total.clamp(min=1)
        mean_C = torch.where(some, both[:-1] / divisor, self.running_mean.to(x))
        centred = x - mean_C[:, None, None]
        squares_C = dist.gather_with_grad(centred.square().sum((0, 2, 3))[None] * self.counted).sum(0)
        variance_C = torch.where(some, squares_C / divisor, self.running_var.to(x))
        self._follow(mean_C.detach(), variance_C.detach() * divisor / (divisor - 1).clamp(min=1), some)
        scale_C = (variance_C + self.eps).rsqrt() * self.weight
        return (centred * scale_C[:, None, None] + self.bias[:, None, None]).to(x_NCHW.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, variance_C: Tensor, some: Tensor) -> None:
        """Move the statistics that evaluation uses; where no rank had a picture they stay."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        for kept, seen in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            kept.lerp_(seen.to(kept), some.to(kept) * float(self.momentum or 0))


NORMS: dict[str, type[BatchNorm]] = {"plain": BatchNorm, "sync": SyncBatchNorm, "frozen": FrozenBatchNorm}


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions around a shortcut."""

    def __init__(self, inputs: int, width: int, *, stride: int, norm: type[BatchNorm]) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, 4 width, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x_NCHW)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x_NCHW if self.downsample is None else self.downsample(x_NCHW)))


class ResNetStem(nn.Module):
    """Convolution, pooling and three stages of bottlenecks; `channels` come out."""

    def __init__(self, blocks: tuple[int, int, int], *, norm: Norm = "plain", width: int = 64) -> None:
        super().__init__()
        kind = NORMS[norm]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), kind(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            parts = []
            for number in range(count):
                parts.append(Bottleneck(inputs, inner, stride=2 if stage and not number else 1, norm=kind))
                inputs = EXPANSION * inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*parts))
        self.channels = inputs
        self._norms = [part for part in self.modules() if isinstance(part, BatchNorm)]
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_NCHW: Tensor, *, counted: bool = True) -> Tensor:
        """Return the grid [N, channels, H / 16, W / 16] of normalised pictures.

        With `counted` false they are a stand-in on a rank without pictures: no statistics are taken of them.
        """
        for norm in self._norms:
            norm.counted = counted
        x = self.maxpool(F.relu(self.bn1(self.conv1(image_NCHW))))
        return self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take a classifier's weights, torchvision's or timm's names; its last stage and head are left out.

        Raises:
            ConfigError: they are of another net.
        """
        mine = {name: x for name, x in state.items() if not name.startswith(("layer4.", "fc."))}
        try:
            missing, unexpected = self.load_state_dict(mine, strict=False)
        except RuntimeError as error:
            raise ConfigError(f"model.stem_weights: they do not fit the stem ({str(error)[:300]})") from None
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ConfigError(
                f"model.stem_weights: they do not fit the stem; missing {missing[:3]}, left over {unexpected[:3]}"
            )

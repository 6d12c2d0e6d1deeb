"""Vision towers: any timm model, with patch tokens, a pooled feature and a linear projection.

Shapes: N = images, P = patches (or grid cells), C = trunk width, E = joint embedding width.
"""

from typing import Any, Literal, NamedTuple

import timm
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import ConfigError, Section
from pretrain.models import convert_efficientnet
from pretrain.registry import nearest

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Config(Section):
    """`model.vision`: which timm model, and how its pictures are prepared."""

    name: str = "vit_base_patch32_clip_224"
    image_size: int = Field(default=224, gt=0)
    args: dict[str, Any] = Field(default_factory=dict)  #: more arguments of the timm model: depth, drop_path_rate ...
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    weights: str | None = None  #: a local .safetensors or .pth: timm's names, or EfficientNet-PyTorch's
    frozen: bool = False  #: LiT (Zhai et al. 2021, arXiv:2111.07991): the trunk stays as it is, the projection trains


class Output(NamedTuple):
    """What a vision tower computes in one pass."""

    tokens_NPC: Tensor  #: patch tokens before pooling, without class token
    image_NE: Tensor  #: projected, not normalised


class Normalise(nn.Module):
    """uint8 pixels to the mean and spread that a trunk is made for, on its device; floats pass, they are done."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        for name, value in (("mean_C11", mean), ("std_C11", std)):  # not saved: they are in the config
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Return float32 [N, C, H, W]: divided by 255 first, as torchvision does, so that all bits agree."""
        if image_NCHW.dtype != torch.uint8:
            return image_NCHW
        return image_NCHW.float().div_(255.0).sub_(self.mean_C11).div_(self.std_C11)


class VisionTower(nn.Module):
    """A timm trunk and its projection into the joint space."""

    def __init__(self, config: Config, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.mean, config.std)
        self.trunk = _create(config)
        self.width: int = self.trunk.num_features
        self.projection = nn.Linear(self.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=self.width**-0.5)
        if config.frozen:
            self.trunk.requires_grad_(requires_grad=False)
            self.trunk.eval()

    def train(self, mode: bool = True) -> "VisionTower":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode; a frozen trunk stays in eval mode, so that its batch norms keep their statistics."""
        super().train(mode)
        if self.config.frozen:
            self.trunk.eval()
        return self

    def forward(self, image_NCHW: Tensor) -> Output:
        """Return patch tokens [N, P, C] and projected features [N, E]."""
        # convolutions are up to 1.7 times as fast so; ZeRO flattens weights, which keep their own order
        image_NCHW = self.normalise(image_NCHW).contiguous(memory_format=torch.channels_last)
        features = self.trunk.forward_features(image_NCHW)
        pooled_NC = self.trunk.forward_head(features, pre_logits=True)
        return Output(self._tokens(features), self.projection(pooled_NC))

    def _tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 4:  # a convolutional map, channels first
            return features.flatten(2).transpose(1, 2)
        return features[:, getattr(self.trunk, "num_prefix_tokens", 0) :]


def _create(config: Config) -> nn.Module:
    if not timm.is_model(config.name):
        raise ConfigError(
            f"model.vision.name: timm has no {config.name!r}.{nearest(config.name, timm.list_models())} "
            "List them with `python -c 'import timm; print(timm.list_models())'`"
        )
    args = dict(config.args)
    if "img_size" not in args and takes_size(config.name):
        args["img_size"] = config.image_size
    try:
        trunk = timm.create_model(config.name, pretrained=False, num_classes=0, **args)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"model.vision.args: timm's {config.name} cannot be built with {args}: {error}") from error
    if config.weights:
        _load(trunk, config.weights)
    return trunk


def takes_size(name: str) -> bool:
    """Return whether a tower owns a table of positions and so must know the image size; convolutions take any."""
    return bool(timm.get_pretrained_cfg(name) and timm.get_pretrained_cfg(name).fixed_input_size)


def _load(trunk: nn.Module, path: str) -> None:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if convert_efficientnet.is_efficientnet_pytorch(state):
        state = convert_efficientnet.to_timm(state, trunk.state_dict())
    missing, unexpected = trunk.load_state_dict(state, strict=False)
    left = [name for name in unexpected if not name.startswith(("classifier.", "head.", "fc."))]
    if missing or left:
        raise ConfigError(
            f"model.vision.weights: {path} does not fit the trunk; missing {missing[:3]}, left over {left[:3]}"
        )

"""Vision towers: any timm model, with patch tokens, a pooled feature and a linear projection.

Shapes: N = images, P = patches (or grid cells), C = trunk width, E = joint embedding width.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import timm
import torch
from pydantic import Field, StrictBool, model_validator
from torch import Tensor, nn

from pretrain.config import ConfigError, Section
from pretrain.models import blocks, convert_efficientnet, depth
from pretrain.models.depth import Depth
from pretrain.models.patch_dropout import PatchDropout
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
    unlocked_blocks: int = Field(default=0, ge=0)  #: with frozen: so many of the last blocks train nevertheless
    checkpointing: StrictBool | int = Field(default=False, ge=0)  #: recompute each block in backward, or one in so many
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)  #: share of the patches that training leaves out (FLIP)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.unlocked_blocks and not self.frozen:
            raise ValueError("unlocked_blocks says what a frozen tower trains; set frozen=true or leave it out")
        if "patch_drop_rate" in self.args:
            raise ValueError("args.patch_drop_rate draws from no sample's hash; use patch_dropout instead")
        return self


class Output(NamedTuple):
    """What a vision tower computes in one pass."""

    tokens_NPC: Tensor  #: patch tokens before pooling, without class token
    image_NE: Tensor | None  #: projected, not normalised; None from a tower without a projection
    pooled_NC: Tensor | None = None  #: what was projected


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
    """A timm trunk and its projection into the joint space; `embed_dim` None: only its tokens are wanted."""

    def __init__(self, config: Config, embed_dim: int | None) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.mean, config.std)
        self.trunk = _create(config)
        self.width: int = self.trunk.num_features
        self.projection: nn.Linear | None = None
        if embed_dim is not None:
            self.projection = nn.Linear(self.width, embed_dim, bias=False)
            nn.init.normal_(self.projection.weight, std=self.width**-0.5)
        self._open: list[nn.Module] = []  # blocks of a frozen trunk that train
        if config.frozen:
            self._open = depth.lock(self.trunk, config.unlocked_blocks, key="model.vision.unlocked_blocks")
        if config.patch_dropout:
            _drop_patches(self.trunk, config)
        blocks.recompute(self.trunk, config.checkpointing, key="model.vision.checkpointing")
        self.train()

    def train(self, mode: bool = True) -> "VisionTower":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode; what is frozen stays in eval mode, so that its batch norms keep their statistics."""
        super().train(mode)
        if self.config.frozen:
            self.trunk.eval()
            for block in self._open:
                block.train(mode)
            if self.config.patch_dropout:
                self.trunk.patch_drop.train(mode)
        return self

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter lies."""
        return depth.of_tower(self, self.trunk, "vision")

    def forward(self, image_NCHW: Tensor, *, draw_N: Tensor | None = None) -> Output:
        """Return patch tokens [N, P, C] and projected features [N, E]; with patch dropout, `draw_N` says which ones."""
        if self.config.patch_dropout:
            self.trunk.patch_drop.draw_N = draw_N
        # convolutions are up to 1.7 times as fast so; ZeRO flattens weights, which keep their own order
        image_NCHW = self.normalise(image_NCHW).contiguous(memory_format=torch.channels_last)
        features = self.trunk.forward_features(image_NCHW)
        if self.projection is None:
            return Output(self._tokens(features), None)
        tokens_NPC, pooled_NC = self._pooled(features)
        return Output(tokens_NPC, self.projection(pooled_NC), pooled_NC)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let a stand-in for missing pictures pass: batch norms take no statistics of it, nor count it."""
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm in norms:
                norm.train()

    def _pooled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self._tokens(features), self.trunk.forward_head(features, pre_logits=True)

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


def _drop_patches(trunk: nn.Module, config: Config) -> None:
    """Put our patch dropout where timm's would stand.

    Raises:
        ConfigError: the trunk has no such place, or needs to know where the kept patches were.
    """
    if not isinstance(getattr(trunk, "patch_drop", None), nn.Identity):
        raise ConfigError(
            f"model.vision.patch_dropout: timm's {config.name} cannot leave patches out; take a plain ViT "
            "(vit_base_patch16_clip_224, ...) or set it to 0"
        )
    trunk.patch_drop = PatchDropout(config.patch_dropout, prefix_tokens=int(trunk.num_prefix_tokens))  # type: ignore[arg-type]


def among(names: Collection[str], trunk: str) -> bool:
    """Return whether weights of a trunk, whose names begin with `trunk`, are among these."""
    return any(name.startswith(trunk) and name.endswith(("weight", "bias")) for name in names)


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

"""Which vision towers are CLIP's own ViT, whatever timm calls them: those have a place in every library's CLIP class.

CLIP's ViT (Radford et al. 2021, arXiv:2103.00020): patches without bias, a class token, learned positions, a norm
before the blocks, pre-norm blocks with GELU or QuickGELU, the class token's state behind the last norm.
"""

from typing import Literal, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pretrain.config import ConfigError
from pretrain.models import vision

Activation = Literal["gelu", "quick_gelu"]


class ClipShape(NamedTuple):
    """The numbers that make one CLIP ViT; lengths in tokens, channels or pixels."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int  #: width of the feed-forward half
    activation: Activation
    eps: float = 1e-5


def of(config: vision.Config) -> ClipShape:
    """Return the tower's shape.

    Raises:
        ConfigError: the tower is something else; the message says in what it differs.
    """
    trunk = skeleton(config).trunk
    difference = _difference(trunk)
    if difference:
        raise ConfigError(f"model.vision: {config.name} is not CLIP's ViT ({difference})")
    block = trunk.blocks[0]
    return ClipShape(
        image_size=config.image_size,
        patch_size=trunk.patch_embed.patch_size[0],
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        activation="gelu" if isinstance(block.mlp.act, nn.GELU) else "quick_gelu",
        eps=trunk.norm.eps,
    )


def skeleton(config: vision.Config, embed_dim: int = 1) -> vision.VisionTower:
    """Return the tower without memory for its weights."""
    with torch.device("meta"):
        return vision.VisionTower(config.model_copy(update={"weights": None}), embed_dim)


def _difference(trunk: nn.Module) -> str:
    if type(trunk) is not VisionTransformer:
        return f"it is a {type(trunk).__name__}"
    if trunk.global_pool != "token" or trunk.no_embed_class or trunk.num_prefix_tokens != 1:
        return "it does not pool one class token that has a position"
    other = sorted(set(trunk.state_dict()) ^ weights(len(trunk.blocks)))
    if other:
        return f"{other[0]} is in one and not in the other"
    act = trunk.blocks[0].mlp.act
    if type(act).__name__ not in ("GELU", "QuickGELU") or getattr(act, "approximate", "none") != "none":
        return f"its activation is {type(act).__name__}"
    if trunk.patch_embed.patch_size[0] != trunk.patch_embed.patch_size[1]:
        return "its patches are not square"
    if trunk.patch_embed.dynamic_img_pad or trunk.patch_embed.grid_size[0] != trunk.patch_embed.grid_size[1]:
        return "its grid is not square"
    return "" if trunk.norm.eps == trunk.blocks[0].norm1.eps == trunk.norm_pre.eps else "its norms differ in eps"


def weights(layers: int) -> set[str]:
    """Return the names of all of timm's weights in a CLIP ViT."""
    norms = ["norm_pre", "norm", *(f"blocks.{i}.norm{n}" for i in range(layers) for n in (1, 2))]
    linears = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    modules = norms + [f"blocks.{i}.{linear}" for i in range(layers) for linear in linears]
    leaves = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    return leaves | {"cls_token", "pos_embed", "patch_embed.proj.weight"}


# timm's name of a shape, without the size of its pictures
_NAMES = {
    (32, 768, 12, 12, 3072): "vit_base_patch32_clip",
    (16, 768, 12, 12, 3072): "vit_base_patch16_clip",
    (14, 1024, 24, 16, 4096): "vit_large_patch14_clip",
    (14, 1280, 32, 16, 5120): "vit_huge_patch14_clip",
}


def to_config(shape: ClipShape) -> vision.Config:
    """Return a vision section that builds this shape: timm's own name where it has one, else arguments to ViT-B/32.

    Raises:
        ConfigError: timm cannot build it.
    """
    if shape.eps != 1e-5:
        raise ConfigError(f"vision tower: its norms use eps {shape.eps}, timm's CLIP ViT can only be built with 1e-5")
    variant = "_quickgelu_224" if shape.activation == "quick_gelu" else "_224"
    name = _NAMES.get((shape.patch_size, shape.width, shape.layers, shape.heads, shape.hidden), "")
    if name + variant in timm.list_models("vit_*_clip*"):
        return vision.Config(name=name + variant, image_size=shape.image_size)
    args = {
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.layers,
        "num_heads": shape.heads,
        "mlp_ratio": ratio(shape.hidden, shape.width),
    }
    usual = {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    return vision.Config(
        name="vit_base_patch32_clip" + variant,
        image_size=shape.image_size,
        args={key: value for key, value in args.items() if value != usual[key]},
    )


def ratio(hidden: int, width: int) -> float:
    """Return a ratio that gives `hidden` again, whether a library cuts or rounds width * ratio."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.25) / width

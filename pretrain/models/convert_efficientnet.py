"""Weights of EfficientNet-PyTorch's layout (a `.pth` of lukemelas' package and its kin), as timm names them.

There, blocks are numbered through and a project convolution is told from an expand convolution by its name; in timm,
blocks sit in stages, and the first stage, which does not expand, calls its project convolution `conv_pw`.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from pretrain.models.convert import Pair, Weights, same, take

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_EXPANDING = {
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
    "conv_pwl": "_project_conv", "bn3": "_bn2", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand",
}  # fmt: skip
_SEPARABLE = {
    "conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2",
    "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand",
}  # fmt: skip


def is_efficientnet_pytorch(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are named as EfficientNet-PyTorch names them."""
    return "_conv_stem.weight" in state


def to_timm(state: Mapping[str, Tensor], trunk: Iterable[str]) -> Weights:
    """Return EfficientNet-PyTorch's weights under the names of a timm trunk without its classifier.

    Raises:
        ConfigError: one of the two has a weight that the other has no place for.
    """
    kept = {name: x for name, x in state.items() if not name.startswith("_fc.")}
    return take(_pairs(list(trunk)), kept, layout="EfficientNet-PyTorch")


def _pairs(names: list[str]) -> list[Pair]:
    blocks = list(dict.fromkeys(tuple(name.split(".")[1:3]) for name in names if name.startswith("blocks.")))
    expanding = {tuple(name.split(".")[1:3]) for name in names if ".conv_pwl." in name}
    pairs = [same("conv_stem.weight", "_conv_stem.weight"), same("conv_head.weight", "_conv_head.weight")]
    pairs += [
        same(f"{ours}.{leaf}", f"{theirs}.{leaf}")
        for ours, theirs in (("bn1", "_bn0"), ("bn2", "_bn1"))
        for leaf in _NORM
    ]
    for number, (stage, place) in enumerate(blocks):
        prefix = f"blocks.{stage}.{place}."
        table = _EXPANDING if (stage, place) in expanding else _SEPARABLE
        for name in names:
            if name.startswith(prefix):
                module, _, leaf = name.removeprefix(prefix).rpartition(".")
                pairs.append(same(name, f"_blocks.{number}.{table.get(module, module)}.{leaf}"))
    return pairs

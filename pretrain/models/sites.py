"""Where methods attach inside a model: the linears and the sub-layer outputs of every transformer layer, by role.

Adapters, LoRA and prefixes replace modules at these places before ZeRO sees them and edit no tower. The roles are the
same for every kind of tower, whatever its modules are called:

    qkv (one linear for all three) or q, k, v;   out, up, down;   and per layer the modules whose outputs are added
    to the residual stream: attention, mlp;   where a layer also reads a memory or pictures, cross_q, cross_out and
    cross, with cross_kv or cross_k, cross_v

The stacks of an encoder-decoder are the towers `encoder` and `decoder`. In OFA the output of an attention is that of
the norm behind it. Convolutional towers have no such layers and offer no sites.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from pretrain.config import ConfigError


def _t5_mlp(number: int) -> dict[str, str]:
    inner = f"layer.{number}.DenseReluDense"
    return {"up": f"{inner}.wi", "down": f"{inner}.wo", "mlp": inner}


T5_SELF = {"q": "layer.0.SelfAttention.q", "k": "layer.0.SelfAttention.k", "v": "layer.0.SelfAttention.v",
           "out": "layer.0.SelfAttention.o", "attention": "layer.0.SelfAttention"}  # fmt: skip
T5_CROSS = {"cross_q": "layer.1.EncDecAttention.q", "cross_k": "layer.1.EncDecAttention.k",
            "cross_v": "layer.1.EncDecAttention.v", "cross_out": "layer.1.EncDecAttention.o",
            "cross": "layer.1.EncDecAttention"}  # fmt: skip
ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
CROSS = {"cross_q": "encoder_attn.q_proj", "cross_k": "encoder_attn.k_proj", "cross_v": "encoder_attn.v_proj",
         "cross_out": "encoder_attn.out_proj"}  # fmt: skip
HALVES = {"up": "fc1", "down": "fc2", "mlp": "fc2"}

#: tower kind -> (pattern of a layer's name, role -> path inside the layer)
LAYERS: dict[str, tuple[str, dict[str, str]]] = {
    "native": (
        r"(?P<tower>text|fusion)\.blocks\.(?P<layer>\d+)",
        {"qkv": "attention.qkv", "out": "attention.out", "up": "mlp.up", "down": "mlp.down",
         "attention": "attention", "mlp": "mlp",
         "cross_q": "cross.query", "cross_kv": "cross.kv", "cross_out": "cross.out", "cross": "cross"},
    ),
    "timm": (
        r"(?P<tower>vision)\.(?:tower\.)?trunk\.blocks\.(?P<layer>\d+)",
        {"qkv": "attn.qkv", "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "out": "attn.proj",
         "up": "mlp.fc1", "down": "mlp.fc2", "attention": "attn", "mlp": "mlp"},
    ),
    "bert": (
        r"(?P<tower>text)\.encoder\.encoder\.layer\.(?P<layer>\d+)",
        {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
         "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
         "attention": "attention.output.dense", "mlp": "output.dense"},
    ),
    "clip": (  # transformers' CLIPTextModel, whose names have a level more in its releases 4
        r"(?P<tower>text)\.encoder\.(?:text_model\.)?encoder\.layers\.(?P<layer>\d+)",
        {**ATTENTION, "up": "mlp.fc1", "down": "mlp.fc2", "attention": "self_attn.out_proj", "mlp": "mlp"},
    ),
    "t5 encoder": (r"text\.(?P<tower>encoder)\.block\.(?P<layer>\d+)", {**T5_SELF, **_t5_mlp(1)}),
    "t5 decoder": (r"text\.(?P<tower>decoder)\.block\.(?P<layer>\d+)", {**T5_SELF, **T5_CROSS, **_t5_mlp(2)}),
    "bart": (
        r"text\.(?P<tower>encoder|decoder)\.layers\.(?P<layer>\d+)",
        {**ATTENTION, **CROSS, **HALVES, "attention": "self_attn", "cross": "encoder_attn"},
    ),
    "ofa encoder": (
        r"(?P<tower>encoder)\.layers\.(?P<layer>\d+)", {**ATTENTION, **HALVES, "attention": "attn_ln"}
    ),
    "ofa decoder": (
        r"(?P<tower>decoder)\.layers\.(?P<layer>\d+)",
        {**ATTENTION, **CROSS, **HALVES, "attention": "self_attn_ln", "cross": "cross_attn_ln"},
    ),
}  # fmt: skip


class Site(NamedTuple):
    """One place where a module may be replaced."""

    name: str  #: of the module in the model, as `named_modules` says it
    role: str  #: one of the above
    layer: int  #: counted from the input of its tower
    tower: str  #: "vision", "text", "fusion", "encoder" or "decoder"
    width: int  #: features that come out of the module


def sites(model: nn.Module, *, tower: str = "", roles: tuple[str, ...] = ()) -> list[Site]:
    """Return the sites of a model, in order, of one tower and of some roles where these are given.

    Raises:
        ConfigError: none fits, as in a convolutional tower; the message says so.
    """
    found = [s for s in _all(model) if tower in ("", s.tower) and (not roles or s.role in roles)]
    if not found:
        raise ConfigError(
            f"the {tower or 'model'}'s layers offer no {' or '.join(roles) or 'sites'}; "
            "adapters and LoRA need a transformer tower (a timm ViT, the native text tower, a BERT), or the encoder "
            "and decoder of vlt5 or ofa"
        )
    return found


def _all(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        for pattern, paths in LAYERS.values():
            match = re.fullmatch(pattern, name)
            if not match:
                continue
            inside = dict(module.named_modules())
            for role, path in paths.items():
                if path in inside:
                    yield Site(f"{name}.{path}", role, int(match["layer"]), match["tower"], _width(inside[path]))


def _width(module: nn.Module) -> int:
    """Return the width of a module's output: of its last linear, or of the norm that it is."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    return last.out_features


def replace(model: nn.Module, site: Site, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put `wrap(module)` in the place of a site's module and return it."""
    parent, _, child = site.name.rpartition(".")
    new, above = wrap(model.get_submodule(site.name)), model.get_submodule(parent)
    setattr(above, child, new)
    if getattr(above, "qkv_bias_separate", None) is False:
        # timm's BEiT and EVA keep biases of q and v beside qkv, and would read its weight instead of calling it
        above.qkv_bias_separate = True  # type: ignore[assignment]
    return new

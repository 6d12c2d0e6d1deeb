"""Weights and configs of OpenAI's CLIP and of open_clip (3.3), both ways.

Two layouts of the vision tower: open_clip's own ViT, which is OpenAI's, for towers of CLIP's shape; a timm trunk
(`visual.trunk.*`, `visual.head.proj`) for all else. Text lies at the top level (class CLIP) or under `text.`
(class CustomTextCLIP): both are read, the first is written. Their ViT cuts width * mlp_ratio, ours may round it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config import ConfigError
from pretrain.models import clip_shape, text, vision, vlm
from pretrain.models.clip_shape import ClipShape
from pretrain.models.convert import Pair, Weights, give, leading, linear, same, scalar, take, transposed

LAYOUT = "open_clip"
TRUNK = "local-dir:"  #: timm's schema for a folder with a config.json, where a tower has arguments of its own
_HARMLESS = {"drop_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"}  # of timm: nothing in eval mode
_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_to(config: vlm.Config, state: Mapping[str, Tensor]) -> Weights:
    """Return our weights as open_clip's CLIP class names them."""
    return give(_pairs(config, list(state), native=_native(config) is not None), state, layout=LAYOUT)


def weights_from(config: vlm.Config, state: Mapping[str, Tensor]) -> Weights:
    """Return an open_clip or OpenAI state dict as our weights; wrappers' prefixes and OpenAI's extras are dropped."""
    tidy = _tidy(state)
    native = "visual.conv1.weight" in tidy
    trunk = [name.replace("visual.", "vision.", 1) for name in tidy if name.startswith("visual.trunk.")]
    return take(_pairs(config, trunk, native=native), tidy, layout=LAYOUT)


def _tidy(state: Mapping[str, Tensor]) -> Weights:
    out = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
    out = {re.sub(rf"^text\.(?=({'|'.join(_TEXT)})\b)", "", name): tensor for name, tensor in out.items()}
    for extra in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
        out.pop(extra, None)
    return out


def _pairs(config: vlm.Config, names: list[str], *, native: bool) -> list[Pair]:
    out = [scalar("logit_scale", "logit_scale", most=vlm.VLM.MAX_LOGIT_SCALE)]
    if config.logit_bias is not None:
        out.append(scalar("logit_bias", "logit_bias"))
    if native:
        out += vision_pairs(clip_shape.of(config.vision).layers)
        out.append(transposed("vision.projection.weight", "visual.proj"))
    else:
        trunk = sorted(name for name in names if name.startswith("vision.trunk."))
        out += [same(name, name.replace("vision.", "visual.", 1)) for name in trunk]
        out.append(same("vision.projection.weight", "visual.head.proj.weight"))
    out += [
        same("text.token_embedding.weight", "token_embedding.weight"),
        same("text.positional_embedding", "positional_embedding"),
        *linear("text.norm", "ln_final"),
        transposed("text.projection.weight", "text_projection"),
    ]
    for i in range(config.text.layers):
        mine, other = f"text.blocks.{i}.", f"transformer.resblocks.{i}."
        out += linear(f"{mine}norm1", f"{other}ln_1") + linear(f"{mine}norm2", f"{other}ln_2")
        out += _attention(f"{mine}attention.qkv", f"{mine}attention.out", other)
        out += linear(f"{mine}mlp.up", f"{other}mlp.c_fc") + linear(f"{mine}mlp.down", f"{other}mlp.c_proj")
    return out


def vision_pairs(layers: int) -> list[Pair]:
    """Return the pairs of a CLIP-shaped trunk, without its projection."""
    out = [
        leading("vision.trunk.cls_token", "visual.class_embedding", dims=2),
        leading("vision.trunk.pos_embed", "visual.positional_embedding", dims=1),
        same("vision.trunk.patch_embed.proj.weight", "visual.conv1.weight"),
        *linear("vision.trunk.norm_pre", "visual.ln_pre"),
        *linear("vision.trunk.norm", "visual.ln_post"),  # over all tokens here, over the class token there: the same
    ]
    for i in range(layers):
        mine, other = f"vision.trunk.blocks.{i}.", f"visual.transformer.resblocks.{i}."
        out += linear(f"{mine}norm1", f"{other}ln_1") + linear(f"{mine}norm2", f"{other}ln_2")
        out += _attention(f"{mine}attn.qkv", f"{mine}attn.proj", other)
        out += linear(f"{mine}mlp.fc1", f"{other}mlp.c_fc") + linear(f"{mine}mlp.fc2", f"{other}mlp.c_proj")
    return out


def _attention(qkv: str, out: str, other: str) -> list[Pair]:
    fused = [same(f"{qkv}.{leaf}", f"{other}attn.in_proj_{leaf}") for leaf in ("weight", "bias")]
    return fused + linear(out, f"{other}attn.out_proj")


# --- configs ---------------------------------------------------------------------------------------------------------


def config_to(config: vlm.Config, *, end: int) -> dict[str, Any]:
    """Return open_clip's model_cfg; `end` is the id of the tokenizer's end token.

    Raises:
        ConfigError: open_clip cannot build such a model.
    """
    if config.text.name != "native":
        raise ConfigError(
            f"export to open_clip: the text tower {config.text.name!r} is not our native one, which open_clip's CLIP "
            "class needs; --format diptych holds it"
        )
    words = config.text
    shape = _native(config)
    tree: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": words.activation == "quick_gelu",
        "init_logit_scale": config.logit_scale,
        "vision_cfg": _native_vision(shape) if shape else _timm_vision(config.vision),
        "text_cfg": {
            "context_length": words.context_length,
            "vocab_size": words.vocab_size,
            "width": words.width,
            "heads": words.heads,
            "layers": words.layers,
            "mlp_ratio": clip_shape.ratio(round(words.width * words.mlp_ratio), words.width),
            "pool_type": "eos",  # argmax holds only where the end token has the largest id
            "eos_id": end,
        },
    }
    if config.logit_bias is not None:
        tree["init_logit_bias"] = config.logit_bias
    return tree


def _native(config: vlm.Config) -> ClipShape | None:
    # one flag rules the activation of both towers there, so towers that differ need timm's layout
    try:
        shape = clip_shape.of(config.vision)
    except ConfigError:
        return None
    return shape if shape.activation == config.text.activation and shape.width % shape.heads == 0 else None


def _native_vision(shape: ClipShape) -> dict[str, Any]:
    tree = {
        "image_size": shape.image_size,
        "layers": shape.layers,
        "width": shape.width,
        "head_width": shape.width // shape.heads,
        "patch_size": shape.patch_size,
        "mlp_ratio": clip_shape.ratio(shape.hidden, shape.width),
    }
    return tree if shape.eps == 1e-5 else tree | {"norm_kwargs": {"eps": shape.eps}}


def _timm_vision(config: vision.Config) -> dict[str, Any]:
    args = {key: value for key, value in config.args.items() if key not in _HARMLESS}
    tree = {
        "image_size": config.image_size,
        "timm_model_name": config.name,
        "timm_model_pretrained": False,
        "timm_pool": args.pop("global_pool", ""),
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop_path": args.pop("drop_path_rate", None),
        "patch_dropout": args.pop("patch_drop_rate", 0.0),
    }
    ours = clip_shape.skeleton(config).trunk.state_dict()
    try:
        plain = clip_shape.skeleton(vision.Config(name=config.name, image_size=_size(config.name))).trunk.state_dict()
        alike = {n: x.shape for n, x in plain.items()} == {n: x.shape for n, x in ours.items()}
    except ConfigError:
        alike = False
    if args or not alike:  # open_clip passes no arguments, but timm reads them from a folder
        tree["timm_model_name"] = f"{TRUNK}{config.name}"
    return tree


def trunk_config(config: vision.Config) -> dict[str, Any]:
    """Return timm's config.json of a tower that differs from what timm calls by its name."""
    args = {k: v for k, v in config.args.items() if k not in {"global_pool", "drop_path_rate", "patch_drop_rate"}}
    size = {"img_size": config.image_size} if vision.takes_size(config.name) else {}
    look = {"input_size": [3, config.image_size, config.image_size], "mean": config.mean, "std": config.std}
    return {"architecture": config.name, "num_classes": 0, "model_args": {**size, **args}, "pretrained_cfg": look}


def _size(name: str) -> int:
    import timm

    found = timm.get_pretrained_cfg(name)
    return found.input_size[-1] if found else 224


def config_from(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None, *, tokenizer: str
) -> vlm.Config:
    """Return our model section for an open_clip model_cfg and preprocess_cfg.

    Raises:
        ConfigError: the model has parts that ours has not.
    """
    towers, words = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    activation: clip_shape.Activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    _refuse_foreign(model_cfg, towers, words)
    section = _timm_section(towers) if towers.get("timm_model_name") else _native_section(towers, activation)
    look = dict(preprocess_cfg or {})
    if look.get("resize_mode", "shortest") != "shortest":
        raise ConfigError(f"open_clip config: resize_mode {look['resize_mode']!r} is not supported, only 'shortest'")
    section.mean, section.std = _triple(look.get("mean", section.mean)), _triple(look.get("std", section.std))
    section.interpolation = look.get("interpolation", section.interpolation)
    width = words.get("width", 512)
    return vlm.Config(
        vision=section,
        text=text.Config(
            context_length=words.get("context_length", 77),
            vocab_size=words.get("vocab_size", 49408),
            width=width,
            heads=words.get("heads", 8),
            layers=words.get("layers", 12),
            mlp_ratio=clip_shape.ratio(int(width * words.get("mlp_ratio", 4.0)), width),
            activation=activation,
        ),
        embed_dim=model_cfg["embed_dim"],
        tokenizer=tokenizer,
        logit_scale=model_cfg.get("init_logit_scale", math.log(1 / 0.07)),
        logit_bias=model_cfg.get("init_logit_bias"),
    )


def _triple(value: Any) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return (red, green, blue)


_KNOWN = {
    "": "embed_dim quick_gelu custom_text init_logit_scale init_logit_bias nonscalar_logit_scale vision_cfg text_cfg",
    "vision_cfg": "layers width head_width mlp_ratio patch_size image_size norm_kwargs timm_model_name timm_pool "
    "timm_proj timm_drop_path timm_model_pretrained timm_drop patch_dropout attn_pooler_queries attn_pooler_heads",
    "text_cfg": "context_length vocab_size width heads layers mlp_ratio pool_type eos_id pad_id proj_type "
    "hf_tokenizer_name tokenizer_kwargs hf_model_pretrained hf_proj_type hf_pooler_type",
}
_USUAL = {"pos_embed_type": "learnable", "pool_type": "tok", "block_type": "default"}


def _refuse_foreign(top: Mapping[str, Any], towers: Mapping[str, Any], words: Mapping[str, Any]) -> None:
    """Refuse what would change the features and what we do not build; false, zero and None mean absent there."""
    for where, tree in (("", top), ("vision_cfg", towers), ("text_cfg", words)):
        known = _KNOWN[where].split()
        foreign = [key for key, value in tree.items() if value and key not in known and value != _USUAL.get(key)]
        if foreign:
            key = f"{where}.{foreign[0]}".removeprefix(".")
            raise ConfigError(f"open_clip config: {key}={tree[foreign[0]]!r} has no counterpart in our models")
    if words.get("pool_type", "argmax") not in ("argmax", "eos") or words.get("proj_type", "linear") != "linear":
        raise ConfigError(
            "open_clip config: only text towers that pool the end token and project linearly are supported"
        )
    if isinstance(towers.get("layers"), list | tuple):
        raise ConfigError("open_clip config: OpenAI's modified ResNets are not supported; take one of the ViTs")


def _timm_section(towers: Mapping[str, Any]) -> vision.Config:
    if towers.get("timm_proj", "linear") != "linear":
        raise ConfigError(f"open_clip config: timm_proj={towers['timm_proj']!r}: only 'linear' is supported")
    name, own = towers["timm_model_name"], {}
    if name.startswith(TRUNK):
        tree = json.loads((Path(name.removeprefix(TRUNK)) / "config.json").read_text(encoding="utf-8"))
        name, own = tree["architecture"], {k: v for k, v in tree["model_args"].items() if k != "img_size"}
    pool = towers.get("timm_pool", "avg")
    usual = getattr(clip_shape.skeleton(vision.Config(name=name, image_size=_size(name))).trunk, "global_pool", pool)
    args = {} if pool in ("", usual) or not isinstance(usual, str) else {"global_pool": pool}
    return vision.Config(name=name, image_size=towers.get("image_size", 224), args={**own, **args})


def _native_section(towers: Mapping[str, Any], activation: clip_shape.Activation) -> vision.Config:
    width = towers.get("width", 768)
    return clip_shape.to_config(
        ClipShape(
            image_size=towers.get("image_size", 224),
            patch_size=towers.get("patch_size", 16),
            width=width,
            layers=towers.get("layers", 12),
            heads=width // towers.get("head_width", 64),
            hidden=int(width * towers.get("mlp_ratio", 4.0)),
            activation=activation,
            eps=(towers.get("norm_kwargs") or {}).get("eps", 1e-5),
        )
    )


def infer(state: Mapping[str, Tensor], *, quick_gelu: bool) -> dict[str, Any]:
    """Return the model_cfg of a bare CLIP state dict from its shapes.

    The activation leaves no trace in the weights, and heads are taken to be 64 wide, as in all of OpenAI's models.

    Raises:
        ConfigError: not the state dict of a CLIP ViT.
    """
    tidy = _tidy(state)
    needed = ("visual.conv1.weight", "visual.proj", "text_projection", "token_embedding.weight", "positional_embedding")
    missing = [name for name in needed if name not in tidy]
    if missing:
        raise ConfigError(f"weights: {missing[0]!r} is missing; this is not the state dict of a CLIP ViT")
    conv, table = tidy["visual.conv1.weight"], tidy["visual.positional_embedding"]
    width, patch = conv.shape[0], conv.shape[-1]
    words = tidy["text_projection"].shape[0]
    tree: dict[str, Any] = {
        "embed_dim": tidy["text_projection"].shape[1],
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": patch * math.isqrt(len(table) - 1),
            "layers": sum(bool(re.match(r"visual\..*\.attn\.in_proj_weight$", name)) for name in tidy),
            "width": width,
            "head_width": 64,
            "patch_size": patch,
            "mlp_ratio": clip_shape.ratio(len(tidy["visual.transformer.resblocks.0.mlp.c_fc.bias"]), width),
        },
        "text_cfg": {
            "context_length": len(tidy["positional_embedding"]),
            "vocab_size": len(tidy["token_embedding.weight"]),
            "width": words,
            "heads": words // 64,
            "layers": sum(bool(re.match(r"transformer\..*\.attn\.in_proj_weight$", name)) for name in tidy),
            "mlp_ratio": clip_shape.ratio(len(tidy["transformer.resblocks.0.mlp.c_fc.bias"]), words),
        },
    }
    return tree if "logit_bias" not in tidy else tree | {"init_logit_bias": float(tidy["logit_bias"].reshape(()))}

"""Weights and configs of transformers' VisionTextDualEncoderModel: a timm trunk beside CLIP's text model or a BERT."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.models import convert_transformers, vision, vlm
from pretrain.models.convert import Pair, Weights, give, same, scalar, take

LAYOUT = "transformers VisionTextDualEncoderModel"
MODEL_TYPE = "vision-text-dual-encoder"
TRUNK = "vision_model.timm_model."
READ = "text_model.text_model."  #: as 4.x names it; 5.x drops the second `text_model.` itself
POOLER = "text_model.pooler.dense."
# BERT's pooler is tanh(W x + b), ours the first token x itself. With W this small a multiple of one, tanh is straight
# to 2e-8 x^2, and the text projection undoes the factor; a power of two costs no bit.
SMALL = 2.0**-12


def weights_to(model: vlm.VLM) -> Weights:
    """Return our weights as VisionTextDualEncoderModel names them."""
    config, state = model.config, model.state_dict()
    if config.text.name == "native":
        return give(_pairs(config, state, trunk="vision.trunk."), state, layout=LAYOUT)
    read = {n: x for n, x in state.items() if n.startswith("text.encoder.") and ".pooler." not in n}
    rest = {n: x for n, x in state.items() if not n.startswith("text.encoder.")}
    out = give(_pairs(config, rest, trunk="vision.trunk."), rest, layout=LAYOUT)
    out["text_projection.weight"] /= SMALL
    width = out["text_projection.weight"].shape[1]
    out |= {n.replace("text.encoder.", "text_model.", 1): x.detach().contiguous().clone() for n, x in read.items()}
    return {**out, f"{POOLER}weight": SMALL * torch.eye(width), f"{POOLER}bias": torch.zeros(width)}


def weights_from(config: vlm.Config, state: Mapping[str, Tensor]) -> Weights:
    """Return the state dict of a VisionTextDualEncoderModel with a timm trunk and CLIP's text model as our weights."""
    return take(_pairs(config, state, trunk=TRUNK), state, layout=LAYOUT)


def _pairs(config: vlm.Config, state: Mapping[str, Tensor], *, trunk: str) -> list[Pair]:
    """Return all pairs but those of an encoder; the trunk's are those that `state` holds, under either name."""
    leaves = [name.removeprefix(trunk) for name in state if name.startswith(trunk)]
    out = [
        scalar("logit_scale", "logit_scale", most=vlm.VLM.MAX_LOGIT_SCALE),
        same("vision.projection.weight", "visual_projection.weight"),
        same("text.projection.weight", "text_projection.weight"),
        *(same(f"vision.trunk.{leaf}", f"{TRUNK}{leaf}") for leaf in leaves),
    ]
    return out + (convert_transformers.text_pairs(config.text, READ) if config.text.name == "native" else [])


def config_to(model: vlm.VLM, *, start: int, end: int, pad: int) -> dict[str, Any]:
    """Return what config.json of a VisionTextDualEncoderModel holds; the ids are the tokenizer's.

    Raises:
        ConfigError: VisionTextDualEncoderModel cannot hold such a model.
    """
    config = model.config
    if config.logit_bias is not None:
        raise ConfigError(
            f"export to {LAYOUT}: it has no place for model.logit_bias; --format open_clip (native text tower) or "
            "diptych holds it"
        )
    if config.text.name == "native":
        convert_transformers.refuse_end(end, "CLIPTextModel")
        read = convert_transformers.text_config(config, start=start, end=end, pad=pad)
    else:
        _hold_encoder(model, end=end, pad=pad)
        read = model.text.encoder.config.to_dict()
    args = dict(config.vision.args)
    if vision.takes_size(config.vision.name):
        args.setdefault("img_size", config.vision.image_size)
    seen = {
        "model_type": "timm_wrapper",
        "architecture": config.vision.name,
        "model_args": args,
        "do_pooling": True,
        "hidden_size": model.vision.width,  # the dual encoder asks for it, timm_wrapper has none of its own
        "image_size": config.vision.image_size,
    }
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": MODEL_TYPE,
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale,
        "torch_dtype": "float32",
        "text_config": read,
        "vision_config": seen,
    }


def _hold_encoder(model: vlm.VLM, *, end: int, pad: int) -> None:
    """Refuse an hf: text tower whose pooled feature is not what the library takes, or can be made to take."""
    from transformers import AutoModel

    if model.config.text.pool == "mean":
        raise ConfigError(
            f"export to {LAYOUT}: it takes the text tower's pooler_output, which is never the mean over tokens "
            "(model.text.pool: mean); --format diptych holds the model, or train it with model.text.pool=cls"
        )
    if end == pad:
        raise ConfigError(
            f"export to {LAYOUT}: the tokenizer pads with its end token, which our encoder then leaves out and theirs "
            "sees; --format diptych holds the model, or train it with the encoder's own tokenizer"
        )
    with torch.device("meta"):
        theirs = AutoModel.from_config(model.text.encoder.config)
    pooler = getattr(theirs, "pooler", None)
    if not (
        isinstance(getattr(pooler, "dense", None), nn.Linear)
        and isinstance(getattr(pooler, "activation", None), nn.Tanh)
    ):
        raise ConfigError(
            f"export to {LAYOUT}: {type(theirs).__name__} has not BERT's pooler, which passes the first token on; "
            "--format diptych holds the model"
        )


def config_from(tree: Mapping[str, Any], *, tokenizer: str) -> vlm.Config:
    """Return our model section for config.json of such an export with the native text tower.

    Raises:
        ConfigError: other towers, which only transformers itself reads.
    """
    from transformers import CLIPTextConfig

    seen, read = dict(tree.get("vision_config") or {}), dict(tree.get("text_config") or {})
    if seen.get("model_type") != "timm_wrapper" or read.get("model_type") != "clip_text_model":
        raise ConfigError(
            f"config.json: a dual encoder of {seen.get('model_type')} and {read.get('model_type')}; only timm_wrapper "
            "with clip_text_model is read back. Give the run, or its export with --format diptych"
        )
    if "image_size" not in seen:
        raise ConfigError("config.json: vision_config names no image_size, so it is no export of ours")
    name, size, args = seen["architecture"], seen["image_size"], dict(seen.get("model_args") or {})
    if vision.takes_size(name) and args.get("img_size") == size:
        del args["img_size"]
    return vlm.Config(
        vision=vision.Config(name=name, image_size=size, args=args),
        text=convert_transformers.text_from(CLIPTextConfig(**read)),
        embed_dim=tree["projection_dim"],
        tokenizer=tokenizer,
        logit_scale=float(tree["logit_scale_init_value"]),
    )

"""Weights and configs of transformers' CLIPModel (4.x and 5.x name them alike), both ways."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.config import ConfigError
from pretrain.models import clip_shape, text, vlm
from pretrain.models.clip_shape import ClipShape
from pretrain.models.convert import Pair, Weights, give, leading, linear, same, scalar, split, take

LAYOUT = "transformers CLIPModel"
_OLD = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # buffers in files of 4.x


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_to(config: vlm.Config, state: Mapping[str, Tensor]) -> Weights:
    """Return our weights as CLIPModel names them."""
    return give(_pairs(config), state, layout=LAYOUT)


def weights_from(config: vlm.Config, state: Mapping[str, Tensor]) -> Weights:
    """Return a CLIPModel state dict as our weights."""
    return take(_pairs(config), {n: x for n, x in state.items() if n not in _OLD}, layout=LAYOUT)


def _pairs(config: vlm.Config) -> list[Pair]:
    trunk, seen = "vision.trunk.", "vision_model."
    out = [
        scalar("logit_scale", "logit_scale", most=vlm.VLM.MAX_LOGIT_SCALE),
        same("vision.projection.weight", "visual_projection.weight"),
        same("text.projection.weight", "text_projection.weight"),
        leading(f"{trunk}cls_token", f"{seen}embeddings.class_embedding", dims=2),
        leading(f"{trunk}pos_embed", f"{seen}embeddings.position_embedding.weight", dims=1),
        same(f"{trunk}patch_embed.proj.weight", f"{seen}embeddings.patch_embedding.weight"),
        *linear(f"{trunk}norm_pre", f"{seen}pre_layrnorm"),  # theirs is spelled so
        *linear(f"{trunk}norm", f"{seen}post_layernorm"),
    ]
    for i in range(clip_shape.of(config.vision).layers):
        mine = f"{trunk}blocks.{i}."
        names = [f"{mine}{n}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
        out += _layer(names, f"{seen}encoder.layers.{i}.")
    return out + text_pairs(config.text, "text_model.")


def text_pairs(config: text.Config, read: str) -> list[Pair]:
    """Return the pairs of the native text tower and a CLIPTextModel whose names begin with `read`."""
    out = [
        same("text.token_embedding.weight", f"{read}embeddings.token_embedding.weight"),
        same("text.positional_embedding", f"{read}embeddings.position_embedding.weight"),
        *linear("text.norm", f"{read}final_layer_norm"),
    ]
    for i in range(config.layers):
        mine = f"text.blocks.{i}."
        names = [f"{mine}{n}" for n in ("norm1", "attention.qkv", "attention.out", "norm2", "mlp.up", "mlp.down")]
        out += _layer(names, f"{read}encoder.layers.{i}.")
    return out


def _layer(ours: list[str], theirs: str) -> list[Pair]:
    norm1, qkv, attention, norm2, up, down = ours
    parts = [f"{theirs}self_attn.{part}_proj" for part in "qkv"]
    out = [split(f"{qkv}.{leaf}", [f"{part}.{leaf}" for part in parts]) for leaf in ("weight", "bias")]
    out += linear(attention, f"{theirs}self_attn.out_proj")
    out += linear(norm1, f"{theirs}layer_norm1") + linear(norm2, f"{theirs}layer_norm2")
    return out + linear(up, f"{theirs}mlp.fc1") + linear(down, f"{theirs}mlp.fc2")


# --- configs ---------------------------------------------------------------------------------------------------------


def config_to(config: vlm.Config, *, start: int, end: int, pad: int) -> dict[str, Any]:
    """Return what config.json of a CLIPModel holds; the ids are the tokenizer's.

    Raises:
        ConfigError: CLIPModel cannot hold such a model.
    """
    shape = _hold(config, end=end)
    seen = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "projection_dim": config.embed_dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_channels": 3,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "hidden_act": shape.activation,
        "layer_norm_eps": shape.eps,
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale,
        "initializer_factor": 1.0,
        "torch_dtype": "float32",
        "text_config": text_config(config, start=start, end=end, pad=pad),
        "vision_config": seen,
    }


def text_config(config: vlm.Config, *, start: int, end: int, pad: int) -> dict[str, Any]:
    """Return what config.json of a CLIPTextModel holds for the native text tower."""
    words = config.text
    return {
        "model_type": "clip_text_model",
        "vocab_size": words.vocab_size,
        "hidden_size": words.width,
        "intermediate_size": round(words.width * words.mlp_ratio),
        "projection_dim": config.embed_dim,
        "num_hidden_layers": words.layers,
        "num_attention_heads": words.heads,
        "max_position_embeddings": words.context_length,
        "hidden_act": words.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": pad,
    }


def _hold(config: vlm.Config, *, end: int) -> ClipShape:
    if config.text.name != "native":
        raise ConfigError(
            f"export to transformers: CLIPModel has no place for the text tower {config.text.name!r}; "
            "--format diptych holds it"
        )
    if config.logit_bias is not None:
        raise ConfigError(
            "export to transformers: CLIPModel has no place for model.logit_bias; --format open_clip does"
        )
    refuse_end(end, "CLIPModel")
    try:
        return clip_shape.of(config.vision)
    except ConfigError as error:
        raise ConfigError(
            f"export to transformers: CLIPModel holds only CLIP's own ViT; {error}. --format open_clip holds timm's, "
            "and so does --format dual_encoder"
        ) from error


def refuse_end(end: int, name: str) -> None:
    """Refuse the end token that the library takes for another.

    Raises:
        ConfigError: it is 2.
    """
    if end == 2:
        raise ConfigError(
            f"export to transformers: with end token 2 {name} pools at the largest id instead (it takes 2 for an "
            "old mistake); --format open_clip holds the model, or train a tokenizer with another end id"
        )


def config_from(tree: Mapping[str, Any], *, tokenizer: str) -> vlm.Config:
    """Return our model section for a CLIPModel's config.json; what it leaves out has CLIPConfig's default.

    Raises:
        ConfigError: not a CLIPModel, or with parts that ours has not.
    """
    if tree.get("model_type") != "clip":
        raise ConfigError(
            f"config.json: model_type {tree.get('model_type')!r} is not 'clip'; give a CLIPModel's folder"
        )
    from transformers import CLIPConfig

    full = CLIPConfig.from_dict(dict(tree))
    read, seen = full.text_config, full.vision_config
    _known_activation("vision_config", seen)
    shape = ClipShape(
        image_size=seen.image_size,
        patch_size=seen.patch_size,
        width=seen.hidden_size,
        layers=seen.num_hidden_layers,
        heads=seen.num_attention_heads,
        hidden=seen.intermediate_size,
        activation=seen.hidden_act,
        eps=seen.layer_norm_eps,
    )
    return vlm.Config(
        vision=clip_shape.to_config(shape),
        text=text_from(read),
        embed_dim=full.projection_dim,
        tokenizer=tokenizer,
        logit_scale=float(full.logit_scale_init_value),
    )


def text_from(read: Any) -> text.Config:
    """Return our text section for a CLIPTextConfig.

    Raises:
        ConfigError: with parts that our native tower has not.
    """
    _known_activation("text_config", read)
    if read.layer_norm_eps != 1e-5:
        raise ConfigError(f"config.json: text_config.layer_norm_eps {read.layer_norm_eps} is not 1e-5")
    return text.Config(
        context_length=read.max_position_embeddings,
        vocab_size=read.vocab_size,
        width=read.hidden_size,
        heads=read.num_attention_heads,
        layers=read.num_hidden_layers,
        mlp_ratio=clip_shape.ratio(read.intermediate_size, read.hidden_size),
        activation=read.hidden_act,
    )


def _known_activation(name: str, part: Any) -> None:
    if part.hidden_act not in ("gelu", "quick_gelu"):
        raise ConfigError(f"config.json: {name}.hidden_act {part.hidden_act!r} is neither gelu nor quick_gelu")

"""Weights of OFA's releases in our names and back: fairseq's checkpoints, and the layout of the transformers branch.

Our names are fairseq's, but for the tables of positions (a module of their own) and the words (one module, where
fairseq names the tensor three times). Buffers that follow from the sizes are left out, and so are heads that the
release trains on top.

The text stack of Base and Large starts from BART (`from_bart`): its layers are post-norm, OFA's are pre-norm, so that
weights transfer and the function does not; BART's table of positions begins two rows later.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pretrain.config import ConfigError
from pretrain.models import weight_files

POSITIONS = (
    "embed_positions", "embed_image_positions", "pos_ln", "image_pos_ln",
    "token_rel_pos_table_list", "image_rel_pos_table_list",
)  # fmt: skip
WORDS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
DERIVED = re.compile(r"(encoder|decoder)\.(version|token_rp_bucket|image_rp_bucket|image_position_idx|_future_mask)")
BESIDE = ("classification_heads.", "mlp_head.", "temp")
#: fairseq's name -> that of the transformers branch, inside a layer of the stack
TRANSFORMERS = {
    "encoder": {"attn_ln": "self_attn_mid_layer_norm", "ffn_layernorm": "ffn_layer_norm"},
    "decoder": {
        "self_attn_ln": "self_attn_mid_layer_norm", "cross_attn_ln": "cross_attn_mid_layer_norm",
        "encoder_attn": "cross_attn", "encoder_attn_layer_norm": "cross_attn_layer_norm",
        "ffn_layernorm": "ffn_layer_norm",
    },
}  # fmt: skip
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.([^.]+)(.*)")


def read(path: str, *, key: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or a pickle, fairseq's or another's, in float32.

    Raises:
        ConfigError: no such file, or one that cannot be read.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{key}: {path} is no file; give a .safetensors, .pt, .pth or .bin")
    state = weight_files.of_file(Path(path))
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def is_ofa(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are OFA's, in one of the two layouts."""
    return "encoder.embed_image_positions.weight" in state and "encoder.pos_q_linear.weight" in state


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a release's weights under our names.

    Raises:
        ConfigError: the three copies of the words differ: embeddings that are not tied, which we do not hold.
    """
    if not is_ofa(state):
        raise ConfigError("these weights are not OFA's: no encoder.embed_image_positions.weight")
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if DERIVED.fullmatch(name) or name.startswith(BESIDE):
            continue
        if name in WORDS:
            if "embed_tokens.weight" in out and not out["embed_tokens.weight"].equal(value):
                raise ConfigError(f"{name} differs from the embeddings of the encoder; OFA ties them")
            out["embed_tokens.weight"] = value
            continue
        out[
            _renamed(name, {side: {theirs: ours for ours, theirs in t.items()} for side, t in TRANSFORMERS.items()})
        ] = value
    return out


def to_fairseq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names of fairseq's checkpoints; what follows from the sizes, fairseq fills in."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for released in WORDS if name == "embed_tokens.weight" else (name.replace(".positions.", ".", 1),):
            out[released] = value
    return out


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names of the transformers branch."""
    return {_renamed(name, TRANSFORMERS, tables=False): value for name, value in to_fairseq(state).items()}


def _renamed(name: str, layers: Mapping[str, Mapping[str, str]], *, tables: bool = True) -> str:
    if match := LAYER.fullmatch(name):
        side, number, part, rest = match.groups()
        return f"{side}.layers.{number}.{layers[side].get(part, part)}{rest}"
    side, _, rest = name.partition(".")
    if tables and side in TRANSFORMERS and rest.partition(".")[0] in POSITIONS:
        return f"{side}.positions.{rest}"
    return name


def from_bart(bart: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of `ours` BART's text stack (transformers' names) can fill, in the shapes of `ours`.

    Words that BART has not keep their values; both must count the text's own symbols alike, from id 0 on.

    Raises:
        ConfigError: BART is of another width, or has fewer layers.
    """
    state = {name.removeprefix("model."): value for name, value in bart.items()}
    if "shared.weight" not in state:
        raise ConfigError("these weights are not BART's: no shared.weight")
    out: dict[str, Tensor] = {}
    for name, value in ours.items():
        side, _, rest = name.partition(".")
        if name == "embed_tokens.weight":
            out[name] = value.clone()
            rows = min(len(value), len(state["shared.weight"]))
            _fill(out[name][:rows], state["shared.weight"][:rows], name)
        elif rest == "positions.embed_positions.weight":
            table = state[f"{side}.embed_positions.weight"][2:]
            out[name] = value.clone()
            rows = min(len(value), len(table))
            _fill(out[name][:rows], table[:rows], name)
        elif rest.startswith("layernorm_embedding."):
            out[name] = _fill(value.clone(), state[f"{side}.{rest}"], name)
        elif LAYER.fullmatch(name) and not re.search(r"\.(c_attn|attn_ln|\w+_attn_ln|ffn_layernorm)(\.|$)", name):
            if name not in state:
                raise ConfigError(f"BART has no {name}: it has fewer layers than the model")
            out[name] = _fill(value.clone(), state[name], name)
    return out


def _fill(target: Tensor, source: Tensor, name: str) -> Tensor:
    if target.shape != source.shape:
        raise ConfigError(f"{name}: BART has {list(source.shape)}, the model {list(target.shape)}; take its width")
    return target.copy_(source)

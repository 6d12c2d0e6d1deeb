"""T5 and BART as transformers names them, and VL-T5 and VL-BART as they were released, to and from our names.

Inside the text model names are equal, so this is about prefixes and tied tensors: we hold the word table once, others
name it up to four times. Files of before the release have the joint encoder under `vis_encoder.`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.models import weight_files
from pretrain.models.convert import Weights
from pretrain.models.encoder_decoder import Config

#: other names of the word table, beside `shared.weight`; the first two inside BART's "model.", the last outside
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
SEEN = "encoder.visual_embedding."
REGIONS = f"{SEEN}obj_order_embedding.weight"  #: the word table once more
#: in old files of T5: one table too many, which nothing reads
UNREAD = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
TABLE, LOGITS = "text.shared.weight", "text.final_logits_bias"


def weights_from(state: Mapping[str, Tensor], *, source: str) -> Weights:
    """Return a T5, a BART, a VL-T5 or a VL-BART under our names; a vision tower is in none of them.

    Raises:
        ConfigError: its head is not tied to its word table, or there is no word table.
    """
    found: Weights = {}
    tables: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").removeprefix("model.")  # DistributedDataParallel's, BART's
        if name.startswith("vis_encoder."):
            name = "encoder." + name.removeprefix("vis_encoder.")
        if name in (*ALIASES, REGIONS, "shared.weight"):
            tables[name] = tensor
        elif name.startswith(SEEN):
            found[f"visual_embedding.{name.removeprefix(SEEN)}"] = tensor
        elif name not in UNREAD:
            found[f"text.{name}"] = tensor
    if not tables:
        raise ConfigError(f"model.text.weights: {source} has no word table (shared.weight); give a T5 or a BART")
    table = tables.get("shared.weight", next(iter(tables.values())))
    for name, other in tables.items():
        if other is not table and not torch.equal(other, table):
            raise ConfigError(
                f"model.text.weights: in {source} {name} differs from the word table; ours is one for words and head "
                "(T5 v1.0 and BART, not T5 v1.1)"
            )
    return {**found, TABLE: table}


def weights_to(config: Config, state: Mapping[str, Tensor], *, seen: bool) -> Weights:
    """Return our weights as transformers names them, tied ones under each of their names.

    With `seen` the visual embedding is there too, as in the released files. A vision tower has no place in either.
    """
    inside = "model." if config.backbone == "bart" else ""
    out: Weights = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous().clone()
        if name == TABLE:
            out |= {f"{inside}{alias}": tensor for alias in ("shared.weight", *ALIASES[:2])} | {ALIASES[2]: tensor}
            out |= {f"{inside}{REGIONS}": tensor} if seen else {}
        elif name == LOGITS:
            out[name.removeprefix("text.")] = tensor
        elif name.startswith("text."):
            out[inside + name.removeprefix("text.")] = tensor
        elif name.startswith("visual_embedding.") and seen:
            out[inside + SEEN + name.removeprefix("visual_embedding.")] = tensor
    return out


def start_from(model: Any, where: str) -> None:
    """Fill a VLT5 with the weights of `hf:FOLDER` or of a released file; rows that the table has more stay as drawn.

    Raises:
        ConfigError: nothing there, or an architecture other than the config's.
    """
    config: Config = model.config.text
    if where.startswith("hf:"):
        folder = Path(where.removeprefix("hf:"))
        _compare(config, weight_files.tree(folder / "config.json"), folder)
        state = weight_files.of_folder(folder)
    else:
        state = weight_files.of_file(Path(where))
    found = weights_from(state, source=where)
    own = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    seen = any(name.startswith("visual_embedding.") for name in found)
    wanted = {n for n in own if n.startswith(("text.", "visual_embedding.") if seen else "text.") and n != LOGITS}
    missing, left = sorted(wanted - set(found)), sorted(set(found) - set(own))
    wrong = [n for n in found if n in own and n not in (TABLE, LOGITS) and found[n].shape != own[n].shape]
    if missing or left or wrong:
        raise ConfigError(
            f"model.text.weights: {where} does not fit model.text; missing {missing[:3]}, left over {left[:3]}, of "
            f"another shape {wrong[:3]}"
        )
    count = len(found[TABLE])
    if count > len(own[TABLE]):
        raise ConfigError(f"model.text.vocab_size: {len(own[TABLE])} rows, {where} has {count}; set it to {count}")
    own[TABLE][:count].copy_(found.pop(TABLE))
    if LOGITS in found:
        own[LOGITS][:, :count].copy_(found.pop(LOGITS))
    model.load_state_dict(found, strict=False)


def _compare(config: Config, tree: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder whose config.json says another architecture than the config.

    Raises:
        ConfigError: the first key that differs, and both values.
    """
    if tree.get("model_type") != config.backbone:
        raise ConfigError(f"model.text.backbone: {config.backbone}, {folder} is of type {tree.get('model_type')!r}")
    t5 = config.backbone == "t5"
    if t5 and tree.get("feed_forward_proj", "relu") != "relu":
        raise ConfigError(f"model.text.weights: {folder} is a T5 v1.1 ({tree['feed_forward_proj']}); give a T5 v1.0")
    sizes = {
        "width": ("d_model", config.width),
        "layers": ("num_layers" if t5 else "encoder_layers", config.layers),
        "layers, as many of the decoder": ("num_decoder_layers" if t5 else "decoder_layers", config.layers),
        "heads": ("num_heads" if t5 else "encoder_attention_heads", config.heads),
        "hidden": ("d_ff" if t5 else "encoder_ffn_dim", config.hidden),
    }
    if t5:
        sizes["head_width"] = ("d_kv", config.head_width or config.width // config.heads)
    else:
        sizes["positions"] = ("max_position_embeddings", config.positions)
    for key, (theirs, ours) in sizes.items():
        if tree.get(theirs) not in (None, ours):
            raise ConfigError(f"model.text.{key}: {ours}, {folder} has {theirs} {tree[theirs]}")
    if not t5 and (tree.get("scale_embedding") or tree.get("activation_function", "gelu") != "gelu"):
        raise ConfigError(f"model.text.weights: {folder} scales its embeddings or has no GELU; give a BART")

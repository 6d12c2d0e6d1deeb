"""A trained model from any folder that holds one: a run, a checkpoint, an export, or a folder of another library."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import config, recipe
from pretrain.config import ConfigError
from pretrain.data import tokenizer
from pretrain.data.compose import Composer
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.transforms import Transform
from pretrain.engine import checkpoint
from pretrain.models import base as models
from pretrain.models import convert_dual_encoder, convert_open_clip, convert_transformers, vlm, weight_files

DELTA = "delta.safetensors"  #: what a fine-tuned run leaves
ENCODER = "text_encoder"  #: where a `diptych` export keeps the encoder of an hf: text tower
KINDS = (
    "a run folder, a checkpoint (runs/NAME/checkpoints/step-...), an export of ours, an open_clip folder "
    "(open_clip_config.json) or a transformers CLIPModel folder (config.json)"
)


@dataclass
class Pretrained:
    """A model with all that it needs to be used: how pictures and texts become its inputs, and where it is from."""

    model: Any  #: in eval mode
    tokenizer: Tokenizer
    transform: Transform
    composer: Composer
    config: Any  #: the model's section
    weights_hash: str  #: of names, shapes and values: equal for a run, its exports and their imports
    source: str  #: the folder that the weights were read from


def load(
    path: str | Path, *, step: int | None = None, device: torch.device | str = "cpu", average: bool = True
) -> Pretrained:
    """Return the model in a folder. Of a run: its newest complete checkpoint, or that of `step`.

    A run that kept a moving average (`ema:`) gives that; with `average` false, the weights of the last step.

    Raises:
        ConfigError: nothing of the known kinds, or one that our models cannot hold.
        CheckpointError: the checkpoint is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"model {path}: no such folder; give {KINDS}")
    if (path / DELTA).is_file():
        raise ConfigError(
            f"model {path}: a fine-tuned run, which holds what it trained and not its base; use "
            "python -m finetune.evaluate, or python -m finetune.export where it can be merged into its base"
        )
    if (path / "checkpoints").is_dir() or (path / "COMPLETE").is_file():
        found = _checkpoint(path, step=step, average=average)
    elif step is not None:
        raise ConfigError(f"--step {step}: {path} is not a run folder, it holds one model only")
    elif (path / "config.yaml").is_file() and (path / "model.safetensors").is_file():
        found = _diptych(path)
    elif (path / "open_clip_config.json").is_file():
        found = _open_clip(path)
    elif (path / "config.json").is_file():
        found = _transformers(path)
    else:
        raise ConfigError(f"model {path}: not a folder of a model that we know; give {KINDS}")
    found.model.to(device)
    return found


def build(section: models.Config, words: Tokenizer, weights: Mapping[str, Tensor], *, source: str) -> Pretrained:
    """Return the model of a config filled with weights, which must be all of its weights.

    Raises:
        ConfigError: config and weights do not belong together.
    """
    bare = section.bare().without_files(weights)
    model = recipe.build_model(bare, words)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    beside = bare.read_from_files  # read just now
    missing = [name for name in missing if not name.startswith(beside)]
    if missing or unexpected:
        raise ConfigError(
            f"model {source}: config and weights do not belong together; missing {missing[:3]}, "
            f"left over {unexpected[:3]}"
        )
    return Pretrained(
        model=model.eval(),
        tokenizer=words,
        transform=recipe.build_transform(section),
        composer=recipe.build_composer(section, words),
        config=model.config,
        weights_hash=hash_of(model.state_dict()),
        source=source,
    )


def hash_of(state: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes and values."""
    out = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        out.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return out.hexdigest()


# --- our own folders -------------------------------------------------------------------------------------------------


def _checkpoint(path: Path, *, step: int | None, average: bool) -> Pretrained:
    if (path / "COMPLETE").is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: {path} is one checkpoint; give the run folder instead")
        run, found = path.parent.parent, path
    else:
        run, complete = path, checkpoint.complete(path / "checkpoints")
        if step is not None:
            steps = [p for p in complete if int(p.name.removeprefix("step-")) == step]
            there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in complete) or "none"
            if not steps:
                raise ConfigError(f"run {path}: no complete checkpoint of step {step}; there: {there}")
            complete = steps
        if not complete:
            raise ConfigError(f"run {path}: no complete checkpoint yet; train until the first is saved")
        found = complete[0]
    tree = config.read_yaml(run / "config.yaml")
    section = recipe.model_section(tree.get("model", {}), where=f"{run / 'config.yaml'}: model")
    words = tokenizer.load(run / "tokenizer" if (run / "tokenizer").is_dir() else section.tokenizer)
    state = checkpoint.read_weights(found, average=average)
    weights = {n.removeprefix("model."): x for n, x in state.items() if n.startswith("model.")}
    return build(section, words, weights, source=str(found))


def _diptych(path: Path) -> Pretrained:
    tree = config.read_yaml(path / "config.yaml").get("model", {})
    section = recipe.model_section(tree, where=f"{path / 'config.yaml'}: model")
    if isinstance(section, vlm.Config) and section.text.name.startswith("hf:"):
        section.text.name = f"hf:{path / ENCODER}"
    words = tokenizer.load(path / "tokenizer")
    return build(section, words, weight_files.of_file(path / "model.safetensors"), source=str(path))


# --- folders of other libraries --------------------------------------------------------------------------------------


def _open_clip(path: Path) -> Pretrained:
    tree = weight_files.tree(path / "open_clip_config.json")
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(tree.get("model_cfg", ())):
        raise ConfigError(f"{path / 'open_clip_config.json'}: model_cfg needs embed_dim, vision_cfg and text_cfg")
    towers = tree["model_cfg"]["vision_cfg"]
    if str(towers.get("timm_model_name", "")).startswith(convert_open_clip.TRUNK):  # found even after a move
        towers["timm_model_name"] = f"{convert_open_clip.TRUNK}{path / 'trunk'}"
    own = tree["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    section = convert_open_clip.config_from(
        tree["model_cfg"], tree.get("preprocess_cfg"), tokenizer=str(path) if own else "clip"
    )
    words = tokenizer.load(section.tokenizer)
    cfg = tree["model_cfg"]["text_cfg"]
    _same_end(words, cfg.get("eos_id", 2) if cfg.get("pool_type", "argmax") == "eos" else None, where=str(path))
    state = weight_files.of_folder(path, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
    return build(section, words, convert_open_clip.weights_from(section, state), source=str(path))


def _transformers(path: Path) -> Pretrained:
    tree = weight_files.tree(path / "config.json")
    dual = tree.get("model_type") == convert_dual_encoder.MODEL_TYPE
    layout = convert_dual_encoder if dual else convert_transformers
    section = layout.config_from(tree, tokenizer=str(path))
    _look(section, path)
    words = tokenizer.load(path)
    end = (tree.get("text_config") or {}).get("eos_token_id", 49407)
    _same_end(words, None if end == 2 else end, where=str(path))
    state = weight_files.of_folder(path)
    return build(section, words, layout.weights_from(section, state), source=str(path))


def _same_end(words: Tokenizer, end: int | None, *, where: str) -> None:
    """Refuse a model that pools elsewhere than at our tokenizer's end token; None: it pools at the largest id."""
    largest = words.vocab_size - 1
    if words.end != (largest if end is None else end):
        raise ConfigError(
            f"model {where}: it pools at token {largest if end is None else end}, the end token of its tokenizer is "
            f"{words.end}; correct eos_token_id (transformers) or eos_id (open_clip)"
        )


def _look(section: vlm.Config, path: Path) -> None:
    """Fill in how pictures are prepared; transformers 5 nests it, 4 has a file of its own."""
    tree: dict[str, Any] = {}
    if (path / "processor_config.json").is_file():
        tree = weight_files.tree(path / "processor_config.json").get("image_processor", {})
    if not tree and (path / "preprocessor_config.json").is_file():
        tree = weight_files.tree(path / "preprocessor_config.json")
    size = tree.get("size", section.vision.image_size)
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    filters = {2: "bilinear", 3: "bicubic"}
    if short != section.vision.image_size or tree.get("resample", 3) not in filters:
        raise ConfigError(
            f"model {path}: pictures are resized to {size} with filter {tree.get('resample', 3)}; supported is the "
            f"shortest edge to the tower's {section.vision.image_size}, with filter 2 (bilinear) or 3 (bicubic)"
        )
    section.vision.mean = tree.get("image_mean", section.vision.mean)
    section.vision.std = tree.get("image_std", section.vision.std)
    section.vision.interpolation = filters[tree.get("resample", 3)]

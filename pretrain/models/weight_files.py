"""Weights and configs as other libraries leave them in a folder: safetensors in one file or several, or a pickle."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import ConfigError


def tree(path: Path) -> dict[str, Any]:
    """Return a file of JSON.

    Raises:
        ConfigError: it cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def of_folder(path: Path, names: tuple[str, str] = ("model.safetensors", "pytorch_model.bin")) -> dict[str, Tensor]:
    """Return the floats of a folder as float32: one safetensors file, an index of several, or a pickle's tensors.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    whole, pickled = (path / name for name in names)
    index = whole.with_name(whole.name + ".index.json")
    state: dict[str, Tensor] = {}
    if whole.is_file():
        state = of_file(whole)
    elif index.is_file():
        for part in sorted(set(tree(index)["weight_map"].values())):
            state |= of_file(path / Path(part).name)
    elif pickled.is_file():
        state = of_file(pickled)
    else:
        raise ConfigError(f"model {path}: no weights; expected {names[0]}")
    return {name: x.float() if x.is_floating_point() else x for name, x in state.items()}


def of_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; a pickle may hold them under `state_dict` or `model`, and nothing that runs.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # fairseq keeps its options beside
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises nearly anything on damaged bytes
        raise ConfigError(f"model: {path} cannot be read ({str(error)[:200]}); fetch or write it again") from error
    state = next((found[name] for name in ("state_dict", "model") if isinstance(found.get(name), dict)), found)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

"""delta.safetensors: what a method trained, and nothing else; a few kilobytes that need their base to mean anything."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetune.methods import base
from pretrain import config, registry
from pretrain.config import ConfigError
from pretrain.data.format import write_atomic
from pretrain.pretrained import Pretrained

FILE = "delta.safetensors"
VERSION = "1"


def write(
    path: Path, trained: dict[str, Tensor], *, pretrained: Pretrained, method: base.Config, names: list[str]
) -> None:
    """Write the trained parameters with what they belong to: base, method and class names."""
    about = {
        "diptych_delta": VERSION,
        "base": pretrained.source,
        "base_hash": pretrained.weights_hash,
        "method": method.model_dump_json(),
        "classes": json.dumps(names, ensure_ascii=False),
    }
    write_atomic(path, save({n: p.detach().cpu().contiguous() for n, p in trained.items()}, metadata=about))


def read(path: Path, pretrained: Pretrained, *, names: list[str] | None = None) -> base.Method:
    """Return the method that a delta was saved from, on its base, in eval mode.

    `names` are other classes than it was trained on, for a method with `open_classes`.

    Raises:
        ConfigError: no delta, a damaged one, or one of another base.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"delta {path}: cannot be read ({error})") from error
    if about.get("diptych_delta") != VERSION:
        raise ConfigError(f"delta {path}: no delta of version {VERSION}; fine-tune again with this version")
    if about["base_hash"] != pretrained.weights_hash:
        raise ConfigError(
            f"delta {path}: trained on {about['base']} (weights {about['base_hash']}), not on {pretrained.source} "
            f"(weights {pretrained.weights_hash}); give the base that it was trained on"
        )
    tree = json.loads(about["method"])
    plug = registry.find("finetune.methods", str(tree.get("name")))
    section = config.build(plug.Config, tree, where=f"{path}: method")
    method: base.Method = plug.Method(section, pretrained, names or json.loads(about["classes"]))
    missing, unexpected = method.load_state_dict(weights, strict=False)
    missing = sorted(set(method.trained()) & set(missing))
    if missing or unexpected:
        raise ConfigError(f"delta {path}: missing {missing[:3]}, left over {unexpected[:3]}")
    return method.eval()

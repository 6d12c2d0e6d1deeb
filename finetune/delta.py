"""delta.safetensors: what a method trained, and nothing else; a few kilobytes that need their base to mean anything."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetune.methods import base
from pretrain import config, registry
from pretrain.config import ConfigError
from pretrain.data.format import write_atomic
from pretrain.pretrained import DELTA, Pretrained

FILE = DELTA
VERSION = "1"


def write(
    path: Path,
    state: dict[str, Tensor],
    *,
    pretrained: Pretrained,
    method: base.Config,
    names: list[str],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a method's `state` with what it belongs to: base, method and class names.

    `check` is called before it is there, and may raise.
    """
    about = {
        "diptych_delta": VERSION,
        "base": pretrained.source,
        "base_hash": pretrained.weights_hash,
        "method": method.model_dump_json(),
        "classes": json.dumps(names, ensure_ascii=False),
    }
    data = save({n: p.detach().cpu().contiguous() for n, p in state.items()}, metadata=about)
    write_atomic(path, data, check=check)


def read(
    path: Path, pretrained: Pretrained, *, changes: Iterable[str] = (), names: list[str] | None = None
) -> base.Method:
    """Return the method that a delta was saved from, on its base, in eval mode.

    Args:
        path: the delta.
        pretrained: its base; the method takes it over.
        changes: overrides of the method's config, as method.wise=0.3.
        names: other classes than those it was trained on, for methods that answer about any.

    Raises:
        ConfigError: no delta, a damaged one, one of another base, or other classes that it cannot answer about.
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
    tree = config.override({"method": json.loads(about["method"])}, changes)["method"]
    plug = registry.find("finetune.methods", str(tree.get("name")))
    section = config.build(plug.Config, tree, where=f"{path}: method")
    trained_on = json.loads(about["classes"])
    method: base.Method = plug.Method(section, pretrained, names or trained_on)
    if names not in (None, trained_on) and not method.open_classes:
        raise ConfigError(
            f"delta {path}: {section.name} answers about the {len(trained_on)} classes that it was trained on, the "
            f"task has {len(names or ())} of its own; score it on its own task"
        )
    _fill(method, weights, path)
    return method.eval()


def _fill(method: base.Method, weights: dict[str, Tensor], path: Path) -> None:
    try:
        missing, unexpected = method.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"delta {path}: does not fit its method and base ({error})") from None
    missing = sorted(set(method.state()) & set(missing))
    if missing or unexpected:
        raise ConfigError(f"delta {path}: missing {missing[:3]}, left over {unexpected[:3]}")
    with torch.no_grad():
        method.settle()

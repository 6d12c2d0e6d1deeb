"""What an image tokenizer is: pictures to codes of a codebook and back, and the folder that holds one.

A code stands for 8 x 8 pixels; codes come in the order of the raster. They are the arg-min of a distance, without
noise, so that equal pictures have equal codes. For infilling the middle half of each side is encoded alone: its codes
know nothing of what is around it. A codebook of one's own (a VQGAN) needs no file here: its codes go into shards as a
table of (shard, key, codes), see `python -m data_tools codes`.

    FOLDER/image_tokenizer.json     {"kind": "patch_kmeans", "config": {...}}
    FOLDER/model.safetensors

Shapes: N = images, S = pixels a side, P = codes of an image, (S / 8)^2.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain import config
from pretrain.config import ConfigError, Section
from pretrain.registry import nearest

PIXELS = 8  #: a side, of one code
KINDS = ("patch_kmeans", "vqvae")  #: files of pretrain/models that are image tokenizers
FILE = "image_tokenizer.json"
WEIGHTS = "model.safetensors"


class Config(Section):
    """Base of an image tokenizer's options."""

    codes: int = Field(default=512, gt=1, le=65536)  #: of the codebook
    seed: int = 0  #: of all that fitting draws


class ImageTokenizer(nn.Module):
    """Base of the image tokenizers."""

    kind: ClassVar[str]  #: the name of its file

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def codebook_size(self) -> int:
        """Return the number of codes."""
        return int(self.config.codes)

    def encode(self, image_NCHW: Tensor) -> Tensor:
        """Return int64 [N, P] of pictures in [-1, 1], whose sides are multiples of 8."""
        raise NotImplementedError

    def decode(self, codes_NP: Tensor) -> Tensor:
        """Return square pictures [N, 3, S, S] in [-1, 1]."""
        raise NotImplementedError

    def fit(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Learn from batches of pictures in [-1, 1]; equal batches give equal weights. Return what to tell of it."""
        raise NotImplementedError


def in_unit(image_NCHW: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return image_NCHW.float() / 127.5 - 1


def middle(image_NCHW: Tensor) -> Tensor:
    """Return the middle half of each side, which image infilling hides."""
    height, width = image_NCHW.shape[-2:]
    return image_NCHW[..., height // 4 : height - height // 4, width // 4 : width - width // 4]


def side_of(codes_NP: Tensor) -> int:
    """Return how many codes a square picture is wide."""
    side = round(codes_NP.shape[1] ** 0.5)
    assert side * side == codes_NP.shape[1], f"{codes_NP.shape[1]} codes are no square"
    return side


def module_of(kind: str) -> Any:
    """Return the file of a kind, which offers Config and Tokenizer.

    Raises:
        ConfigError: there is none of that name.
    """
    if kind not in KINDS:
        raise ConfigError(f"no image tokenizer {kind!r}.{nearest(kind, list(KINDS))} Known: {', '.join(KINDS)}")
    return importlib.import_module(f"pretrain.models.{kind}")


def save(tokenizer: ImageTokenizer, folder: str | Path) -> None:
    """Write a folder that `load` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in tokenizer.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    tree = {"kind": tokenizer.kind, "config": tokenizer.config.model_dump(mode="json")}
    (folder / FILE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> ImageTokenizer:
    """Return the image tokenizer of a folder, in eval mode.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder}: no image tokenizer ({FILE}); `python pretrain/codebook.py` fits one")
    try:
        tree = json.loads((folder / FILE).read_text(encoding="utf-8"))
        module = module_of(str(tree["kind"]))
        found: ImageTokenizer = module.Tokenizer(config.build(module.Config, tree["config"], where=str(folder / FILE)))
        found.load_state_dict(load_file(folder / WEIGHTS))
    except ConfigError:
        raise
    except Exception as error:  # safetensors and torch raise nearly anything on damaged files
        raise ConfigError(f"{folder}: cannot be read ({str(error)[:200]}); fit the image tokenizer again") from error
    return found.to(device).eval()

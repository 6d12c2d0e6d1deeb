"""What an export format is: it writes a folder, and reads it back with the library that the folder is for.

Shapes: N = images, B = texts, T = tokens, U = places of a decoder, V = vocabulary, E = joint embedding width,
S = side of a picture in pixels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.batch import Batch, Example
from pretrain.models import vision
from pretrain.pretrained import Pretrained

FILTERS = {"bilinear": 2, "bicubic": 3}  #: as transformers counts them


@dataclass
class Reader:
    """An export as its own library uses it."""

    image: Callable[[Tensor], Tensor]  #: pixels [N, 3, S, S] -> unit-norm features [N, E]
    text: Callable[[Tensor], Tensor]  #: ids [B, T], T the context length -> unit-norm features [B, E]
    pixels: Callable[[Sequence[Image.Image]], Tensor]  #: pictures -> [N, 3, S, S]
    tokens: Callable[[Sequence[str]], list[list[int]]]  #: texts -> ids; what follows the end token does not matter
    scale: float  #: exp of the log temperature
    floors_crop: bool = False  #: cuts at the floor of half the excess, where torchvision and we round it


@dataclass
class WritingReader:
    """An export of a model that reads pictures and a text, and writes."""

    batch: Callable[[Sequence[Image.Image], Sequence[str]], Batch]  #: pictures and texts, which are read and written
    logits: Callable[[Batch], Tensor]  #: at each place of the decoder [B, U, V]


class Format:
    """Base of every format."""

    tags: tuple[str, ...] = ()  #: of the model card
    writing_tags: tuple[str, ...] = ()  #: the same of a model that writes
    holds = ("vlm",)  #: files of models that it can hold; a model of another is refused
    snippet = ""  #: Python for the model card; {folder} is the export's name
    writing_snippet = ""  #: the same of a model that writes

    def write(self, model: Pretrained, folder: Path) -> None:
        """Fill an empty folder.

        Raises:
            ConfigError: the format cannot hold the model; the message says why and which one can.
        """
        raise NotImplementedError

    def settle(self, folder: Path, final: Path) -> None:
        """Change what names the folder itself, once it is verified and before it becomes `final`."""

    def read(self, folder: Path) -> Reader | WritingReader:
        """Load the folder offline, with the library that it is for and nothing of ours."""
        raise NotImplementedError


def our_batch(model: Pretrained, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Batch:
    """Return pictures, in turn, each with a text that is given and a text that is written."""
    shown = [model.transform.evaluate(np.asarray(picture.convert("RGB"))) for picture in pictures]
    rows = [
        model.composer.row(Example(text, images=[], prefix=text, suffix=text), [shown[number % len(shown)]])
        for number, text in enumerate(texts)
    ]
    return model.composer.collate(rows)


def our_pixels(model: Pretrained, picture: Image.Image) -> Tensor:
    """Return a picture as our own transform prepares it and the tower normalises it, [3, S, S]."""
    image_HWC = torch.tensor(model.transform.evaluate(np.asarray(picture.convert("RGB"))))
    with torch.no_grad():
        return model.model.vision.normalise(image_HWC.permute(2, 0, 1)[None])[0].contiguous()


def save_tokenizer(model: Pretrained, folder: Path) -> None:
    """Write the tokenizer's files into the folder itself, with the length at which other libraries cut."""
    model.tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": model.config.text.context_length}
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def clip_processor(section: vision.Config) -> dict[str, Any]:
    """Return what transformers' CLIPImageProcessor is told, to prepare pictures as we do."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": section.image_size},
        "resample": FILTERS[section.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": section.image_size, "width": section.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(section.mean),
        "image_std": list(section.std),
        "do_convert_rgb": True,
    }


def dump(path: Path, tree: Any) -> None:
    """Write JSON as transformers lays it out."""
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

"""A folder of our own: holds every model that we can train, and needs none of the run's files."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional as F

from pretrain import pretrained
from pretrain.exports import base
from pretrain.pretrained import ENCODER, Pretrained


class Format(base.Format):
    """Our own format: config.yaml, model.safetensors, tokenizer/."""

    tags = ("diptych", "zero-shot-image-classification")
    holds = ("vlm", "fused_vlm", "coca")
    snippet = """\
import numpy as np
import torch
from PIL import Image

from pretrain import pretrained
from pretrain.batch import Example

found = pretrained.load("{folder}")
image = Image.new("RGB", (320, 240), "orange")  # or Image.open("photo.jpg").convert("RGB")
pixels = found.transform.evaluate(np.asarray(image))
lines = ["an orange", "a cat"]
rows = [found.composer.row(Example(key=line, images=[], suffix=line), [pixels]) for line in lines]
with torch.no_grad():
    features = found.model(found.composer.collate(rows))
    print((features.scale * features.image[:1] @ features.text.T).softmax(-1))
"""

    def write(self, model: Pretrained, folder: Path) -> None:
        """Write the model section, weights and tokenizer; an hf: text tower lies beside, as its library saves it."""
        section = model.config.model_copy(deep=True)
        section.tokenizer = "tokenizer"
        section.vision.weights = None
        weights = {name: x.contiguous().clone() for name, x in model.model.state_dict().items()}
        if section.text.name.startswith("hf:"):
            section.text.name = f"hf:{ENCODER}"
            model.model.text.encoder.save_pretrained(folder / ENCODER)
            weights = {name: x for name, x in weights.items() if not name.startswith("text.encoder.")}
        text = yaml.safe_dump({"model": section.model_dump(mode="json")}, sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model.tokenizer.save(folder / "tokenizer")

    def read(self, folder: Path) -> base.Reader:
        """Load with pretrained.load."""
        found = pretrained.load(folder)
        length = found.config.text.context_length
        return base.Reader(
            image=lambda image_NCHW: F.normalize(found.model.vision(image_NCHW).image_NE, dim=-1),
            text=lambda tokens_BT: F.normalize(found.model.text(tokens_BT).text_BE, dim=-1),
            pixels=lambda pictures: torch.stack([base.our_pixels(found, picture) for picture in pictures]),
            tokens=lambda texts: found.tokenizer.encode_batch(list(texts), length),
            scale=float(found.model.scale.detach()),
        )

"""A folder of our own: holds every model that we can train, and needs none of the run's files."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional as F

from pretrain import pretrained
from pretrain.exports import base
from pretrain.models import vlm
from pretrain.pretrained import ENCODER, Pretrained


class Format(base.Format):
    """Our own format: config.yaml, model.safetensors, tokenizer/."""

    tags = ("diptych", "zero-shot-image-classification")
    writing_tags = ("diptych", "image-text-to-text")
    holds = ("vlm", "fused_vlm", "coca", "vlt5", "ofa")
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

    writing_snippet = """\
import numpy as np
from PIL import Image

from pretrain import pretrained
from pretrain.batch import Example
from pretrain.models.generate import generate
from pretrain.models.writing import Options

found = pretrained.load("{folder}")
image = Image.new("RGB", (320, 240), "orange")  # or Image.open("photo.jpg").convert("RGB")
asked = Example(key="mine", images=[], prefix="caption:")  # in the words of the instruction that it was trained on
row = found.composer.row(asked, [found.transform.evaluate(np.asarray(image))])
best = generate(found.model, found.composer.collate([row]), Options(beams=5))[0][0]
print(best.score, found.tokenizer.decode(best.tokens))
"""

    def write(self, model: Pretrained, folder: Path) -> None:
        """Write the model section, weights and tokenizer; an hf: text tower lies beside, as its library saves it."""
        weights = {name: x.contiguous().clone() for name, x in model.model.state_dict().items()}
        section = model.config.model_copy(deep=True).without_files(weights)
        section.tokenizer = "tokenizer"
        if isinstance(section, vlm.Config) and section.text.name.startswith("hf:"):
            section.text.name = f"hf:{ENCODER}"
            model.model.text.encoder.save_pretrained(folder / ENCODER)
            weights = {name: x for name, x in weights.items() if not name.startswith("text.encoder.")}
        text = yaml.safe_dump({"model": section.model_dump(mode="json")}, sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model.tokenizer.save(folder / "tokenizer")

    def read(self, folder: Path) -> base.Reader | base.WritingReader:
        """Load with pretrained.load."""
        found = pretrained.load(folder)
        if "seq2seq" in found.model.provides:
            return base.WritingReader(
                batch=lambda pictures, texts: base.our_batch(found, pictures, texts),
                logits=lambda batch: found.model(batch).logits_BUV,
            )
        length = found.config.text.context_length
        return base.Reader(
            image=lambda image_NCHW: F.normalize(found.model.vision(image_NCHW).image_NE, dim=-1),
            text=lambda tokens_BT: F.normalize(found.model.text(tokens_BT).text_BE, dim=-1),
            pixels=lambda pictures: torch.stack([base.our_pixels(found, picture) for picture in pictures]),
            tokens=lambda texts: found.tokenizer.encode_batch(list(texts), length),
            scale=float(found.model.scale.detach()),
        )

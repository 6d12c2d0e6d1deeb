"""A folder for transformers' CLIPModel and CLIPProcessor, 4.x and 5.x: the union of what either expects."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pretrain.exports import base
from pretrain.models import convert_transformers
from pretrain.pretrained import Pretrained


class Format(base.Format):
    """transformers' CLIPModel."""

    tags = ("transformers", "zero-shot-image-classification")
    snippet = """\
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{folder}").eval()
processor = CLIPProcessor.from_pretrained("{folder}")
image = Image.new("RGB", (320, 240), "orange")  # or Image.open("photo.jpg")
inputs = processor(text=["an orange", "a cat"], images=image, return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(-1))
"""

    def write(self, model: Pretrained, folder: Path) -> None:
        """Write config, weights, processor and tokenizer."""
        words = model.tokenizer
        start = words.end if words.start is None else words.start
        tree = convert_transformers.config_to(model.config, start=start, end=words.end, pad=words.pad)
        weights = convert_transformers.weights_to(model.config, model.model.state_dict())
        base.dump(folder / "config.json", tree)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        look = base.clip_processor(model.config.vision)
        base.dump(folder / "preprocessor_config.json", look)  # 4.x
        base.dump(
            folder / "processor_config.json", {"processor_class": "CLIPProcessor", "image_processor": look}
        )  # 5.x
        base.save_tokenizer(model, folder)

    def read(self, folder: Path) -> base.Reader:
        """Load with CLIPModel and CLIPProcessor."""
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

        def pooled(out: Any) -> torch.Tensor:
            return F.normalize(out if isinstance(out, torch.Tensor) else out.pooler_output, dim=-1)  # 4.x, 5.x

        return base.Reader(
            image=lambda image_NCHW: pooled(model.get_image_features(pixel_values=image_NCHW)),
            text=lambda tokens_BT: pooled(model.get_text_features(input_ids=tokens_BT)),
            pixels=lambda pictures: processor(images=list(pictures), return_tensors="pt").pixel_values,
            tokens=lambda texts: processor(text=list(texts), truncation=True).input_ids,
            scale=float(model.logit_scale.detach().exp()),
            floors_crop=True,
        )

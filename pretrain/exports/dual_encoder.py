"""A folder for transformers' VisionTextDualEncoderModel: timm's towers, convolutions among them, in transformers."""

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pretrain.config import ConfigError
from pretrain.exports import base
from pretrain.models import convert_dual_encoder
from pretrain.pretrained import Pretrained


class Format(base.Format):
    """transformers' VisionTextDualEncoderModel, with the vision tower in timm (`pip install transformers timm`)."""

    tags = ("transformers", "timm", "zero-shot-image-classification")
    snippet = """\
import torch
from PIL import Image
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

model = VisionTextDualEncoderModel.from_pretrained("{folder}").eval()
processor = VisionTextDualEncoderProcessor.from_pretrained("{folder}", backend="pil")  # the pixels of training
image = Image.new("RGB", (320, 240), "orange")  # or Image.open("photo.jpg")
inputs = processor(text=["an orange", "a cat"], images=image, return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(-1))
"""

    def write(self, model: Pretrained, folder: Path) -> None:
        """Write config, weights, processor and tokenizer."""
        words = model.tokenizer
        start = words.end if words.start is None else words.start
        tree = convert_dual_encoder.config_to(model.model, start=start, end=words.end, pad=words.pad)
        if model.config.text.name == "native":
            _refuse_transformers_4()
        base.dump(folder / "config.json", tree)
        weights = convert_dual_encoder.weights_to(model.model)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        look = base.clip_processor(model.config.vision)
        base.dump(folder / "preprocessor_config.json", look)  # 4.x
        whole = {"processor_class": "VisionTextDualEncoderProcessor", "image_processor": look}
        base.dump(folder / "processor_config.json", whole)  # 5.x
        base.save_tokenizer(model, folder)

    def read(self, folder: Path) -> base.Reader:
        """Load with VisionTextDualEncoderModel and its processor."""
        from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

        model = VisionTextDualEncoderModel.from_pretrained(folder, local_files_only=True).eval()
        # 5.x would resize with torchvision, which is a level of 255 away: enough to turn features of a small conv tower
        processor = VisionTextDualEncoderProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        causal = model.config.text_config.model_type == "clip_text_model"  # looks at nothing right of its end token

        def pooled(out: Any) -> torch.Tensor:
            return F.normalize(out if isinstance(out, torch.Tensor) else out.pooler_output, dim=-1)  # 4.x, 5.x

        def text(tokens_BT: torch.Tensor) -> torch.Tensor:
            seen_BT = None if causal else (tokens_BT != processor.tokenizer.pad_token_id).long()
            return pooled(model.get_text_features(input_ids=tokens_BT, attention_mask=seen_BT))

        return base.Reader(
            image=lambda image_NCHW: pooled(model.get_image_features(pixel_values=image_NCHW)),
            text=text,
            pixels=lambda pictures: processor(images=list(pictures), return_tensors="pt").pixel_values,
            tokens=lambda texts: processor(text=list(texts), truncation=True).input_ids,
            scale=float(model.logit_scale.detach().exp()),
            floors_crop=True,
        )


def _refuse_transformers_4() -> None:
    """Refuse releases whose dual encoder hands token_type_ids to a CLIPTextModel that takes none."""
    from transformers import CLIPTextModel, __version__

    takes = inspect.signature(CLIPTextModel.forward).parameters
    if "token_type_ids" not in takes and "kwargs" not in takes:
        raise ConfigError(
            f"export to dual_encoder: the dual encoder of transformers {__version__} cannot call CLIP's text model; "
            'run `pip install "transformers>=5"`, or use --format open_clip'
        )

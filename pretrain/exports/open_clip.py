"""A folder for open_clip: `local-dir:FOLDER`, or `hf-hub:` once it is uploaded."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pretrain.config import ConfigError
from pretrain.data import tokenizer
from pretrain.exports import base
from pretrain.models import convert_open_clip
from pretrain.pretrained import Pretrained

TRUNK = "trunk"  #: folder of timm's config.json, where the tower has arguments of its own


class Format(base.Format):
    """open_clip's CLIP class."""

    tags = ("open_clip", "zero-shot-image-classification")
    snippet = """\
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
image = preprocess(Image.new("RGB", (320, 240), "orange")).unsqueeze(0)  # or Image.open("photo.jpg")
with torch.no_grad():
    image_features = model.eval().encode_image(image, normalize=True)
    text_features = model.encode_text(tokenizer(["an orange", "a cat"]), normalize=True)
    print((model.logit_scale.exp() * image_features @ text_features.T).softmax(-1))
"""

    def write(self, model: Pretrained, folder: Path) -> None:
        """Write config, weights and tokenizer."""
        section = model.config
        tree = convert_open_clip.config_to(section, end=model.tokenizer.end)
        if tree["vision_cfg"].get("timm_model_name", "").startswith(convert_open_clip.TRUNK):
            (folder / TRUNK).mkdir()
            trunk = convert_open_clip.trunk_config(section.vision)
            (folder / TRUNK / "config.json").write_text(json.dumps(trunk, indent=2) + "\n", encoding="utf-8")
            tree["vision_cfg"]["timm_model_name"] = f"{convert_open_clip.TRUNK}{folder / TRUNK}"
        words = tree["text_cfg"]
        if model.tokenizer.fingerprint == _standard():
            del words["pool_type"], words["eos_id"]  # the largest id is the default, which older releases know too
        else:
            words["hf_tokenizer_name"] = folder.name  # any name will do: local-dir and hf-hub read their own folder
            if model.tokenizer.clip:
                words["tokenizer_kwargs"] = {"clean": "lower"}  # its other cleaning is ours
            base.save_tokenizer(model, folder)
        look = {
            "mean": list(section.vision.mean),
            "std": list(section.vision.std),
            "interpolation": section.vision.interpolation,
            "resize_mode": "shortest",
        }
        text = json.dumps({"model_cfg": tree, "preprocess_cfg": look}, indent=2) + "\n"
        (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
        weights = convert_open_clip.weights_to(section, model.model.state_dict())
        save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})

    def settle(self, folder: Path, final: Path) -> None:
        """Let open_clip find the tower's arguments where the folder will lie: timm wants a whole path."""
        file = folder / "open_clip_config.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        if (folder / TRUNK).is_dir():
            tree["model_cfg"]["vision_cfg"]["timm_model_name"] = f"{convert_open_clip.TRUNK}{final / TRUNK}"
            file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

    def read(self, folder: Path) -> base.Reader:
        """Load with open_clip."""
        try:
            import open_clip
        except ImportError:
            raise ConfigError(
                "export to open_clip: it is checked with open_clip itself; run `pip install open_clip_torch`"
            ) from None
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        model.eval()
        words = open_clip.get_tokenizer(f"local-dir:{folder}")
        return base.Reader(
            image=lambda image_NCHW: model.encode_image(image_NCHW, normalize=True),
            text=lambda tokens_BT: model.encode_text(tokens_BT, normalize=True),
            pixels=lambda pictures: torch.stack([preprocess(picture) for picture in pictures]),
            tokens=lambda texts: words(list(texts)).tolist(),
            scale=float(model.logit_scale.detach().exp()),
        )


def _standard() -> str:
    """Return the fingerprint of CLIP's own tokenizer, which open_clip carries."""
    try:
        return tokenizer.load("clip").fingerprint
    except ConfigError:
        return ""

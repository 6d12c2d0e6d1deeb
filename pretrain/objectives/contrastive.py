"""CLIP: match each picture with its caption among all of the batch (Radford et al. 2021, arXiv:2103.00020)."""

from torch import Tensor

from pretrain.losses.contrastive import contrastive
from pretrain.models.vlm import VLM, Encodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.contrastive`."""

    equal_captions: bool = True  #: rows with the same caption are positives of each other, not false negatives


class Objective(base.Contrast):
    """Symmetric softmax loss over the rows of all ranks."""

    needs = ("image", "text")
    config: Config

    def features(self, encodings: Encodings) -> dict[str, Tensor]:
        """Return both sides and, where the batch has them, hashes of captions."""
        return encodings.sides

    def loss_from_features(self, model: VLM, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the temperature."""
        same_B = features.get("caption") if self.config.equal_captions else None
        loss = contrastive(features["image"], features["text"], scale=model.scale, same_B=same_B)
        return loss, {"scale": base.scalar(model.scale)}

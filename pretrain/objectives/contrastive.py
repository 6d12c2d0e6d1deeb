"""CLIP: match each picture with its caption among all of the batch (Radford et al. 2021, arXiv:2103.00020)."""

from torch import Tensor

from pretrain.losses.contrastive import contrastive
from pretrain.models.vlm import Encodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.contrastive`."""

    equal_captions: bool = True  #: rows with the same caption are positives of each other, not false negatives


class Objective(base.Objective):
    """Symmetric softmax loss over the rows of all ranks."""

    needs = ("image", "text")
    config: Config

    def forward(self, encodings: Encodings) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the temperature."""
        same_B = encodings.batch.caption_B if self.config.equal_captions else None
        loss = contrastive(encodings.image, encodings.text, scale=encodings.scale, same_B=same_B)
        return loss, {"scale": base.scalar(encodings.scale)}

"""SigLIP: every pair is its own yes-or-no question (Zhai et al. 2023, arXiv:2303.15343)."""

import torch
from torch import Tensor

from pretrain.losses.sigmoid import sigmoid
from pretrain.models.vlm import Encodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.sigmoid`; start model.logit_scale at ln 10 and model.logit_bias at -10."""

    equal_captions: bool = True  #: rows with the same caption match each other


class Objective(base.Objective):
    """Pairwise sigmoid loss over the rows of all ranks."""

    needs = ("image", "text")
    config: Config

    def forward(self, encodings: Encodings) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, the temperature and the bias."""
        bias = torch.zeros_like(encodings.scale) if encodings.bias is None else encodings.bias.float()
        same_B = encodings.batch.caption_B if self.config.equal_captions else None
        loss = sigmoid(encodings.image, encodings.text, scale=encodings.scale, bias=bias, same_B=same_B)
        return loss, {"scale": base.scalar(encodings.scale), "bias": base.scalar(bias)}

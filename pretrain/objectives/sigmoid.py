"""SigLIP: every pair is its own yes-or-no question (Zhai et al. 2023, arXiv:2303.15343)."""

import torch
from torch import Tensor

from pretrain.losses.sigmoid import sigmoid
from pretrain.models.vlm import VLM, Encodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.sigmoid`; start model.logit_scale at ln 10 and model.logit_bias at -10."""

    equal_captions: bool = True  #: rows with the same caption match each other


class Objective(base.Contrast):
    """Pairwise sigmoid loss over the rows of all ranks."""

    needs = ("image", "text")
    config: Config

    def features(self, encodings: Encodings) -> dict[str, Tensor]:
        """Return both sides and, where the batch has them, hashes of captions."""
        return encodings.sides

    def loss_from_features(self, model: VLM, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, the temperature and the bias."""
        bias = torch.zeros_like(model.scale) if model.logit_bias is None else model.logit_bias.float()
        same_B = features.get("caption") if self.config.equal_captions else None
        loss = sigmoid(features["image"], features["text"], scale=model.scale, bias=bias, same_B=same_B)
        return loss, {"scale": base.scalar(model.scale), "bias": base.scalar(bias)}

"""CLIP-Adapter: a bottleneck on the features, mixed with them (Gao et al. 2021, arXiv:2110.04544).

    feature = (1 - alpha) f + alpha A(f),  normalised again;  A(f) = relu(relu(f W1) W2), no biases

The last relu is the released code's, the paper's formula has none. As A has no bias, A(c f) = c A(f) for every c > 0:
it does not matter whether f is normalised before, and unit-norm features can be kept.
Shapes: N = images, K = classes, E = joint width.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.layers.bottleneck import Bottleneck
from finetune.layers.sentences import Sentences
from finetune.methods import base
from pretrain.pretrained import Pretrained


class Config(base.Config):
    """`method:` of CLIP-Adapter; the defaults are those of the released code."""

    towers: Literal["vision", "text", "both"] = "vision"  #: whose features are adapted
    reduction: int = Field(default=4, gt=0)  #: joint width over inner width
    alpha: float = Field(default=0.2, ge=0, le=1)  #: share of the adapted picture; 0.6 for fine-grained classes
    beta: float = Field(default=0.2, ge=0, le=1)  #: share of the adapted text
    last_relu: bool = True  #: false: the paper's formula
    templates: str | list[str] | None = None  #: sentences of the classes; null: those of the task


class Method(base.Method):
    """Adapters on frozen features; 524,288 parameters for RN50 (1024 features)."""

    serves = ("classify",)
    needs = ("image", "text")
    trains = ("vision_adapter.*", "text_adapter.*")
    pictures_by = "features"
    open_classes = True
    rates = (
        base.Rate("sgd", 2e-4, 2e-2),
        base.Rate("adamw", 1e-6, 1e-3),
    )
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        width = pretrained.config.embed_dim
        self.vision_adapter = adapter(width, config) if config.towers in ("vision", "both") else None
        self.text_adapter = adapter(width, config) if config.towers in ("text", "both") else None
        self.sentences = Sentences(pretrained, names, config.templates or base.TEMPLATES, frozen=True)

    @classmethod
    def epochs(cls, shots: int | None) -> int:
        """Return the 200 of the released code."""
        return 200

    def classes(self) -> Tensor:
        """Return unit-norm text features [K, E], adapted where the text is."""
        text_KE = self.sentences(self.model.text)
        return text_KE if self.text_adapter is None else mixed(text_KE, self.text_adapter(text_KE), self.config.beta)

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return scaled cosines [N, K]."""
        assert classes_KE is not None
        if self.vision_adapter is not None:
            image_NE = mixed(image_NE, self.vision_adapter(image_NE), self.config.alpha)
        return base.scaled_cosines(self.scale_1, image_NE, classes_KE)


def adapter(width: int, config: Config) -> Bottleneck:
    """Return the adapter of one tower. It keeps torch's first weights: zeros behind a last relu would never move."""
    last = nn.ReLU() if config.last_relu else nn.Identity()
    return Bottleneck(width, max(1, width // config.reduction), bias=False, activation=nn.ReLU(), last=last)


def mixed(x_NE: Tensor, adapted_NE: Tensor, share: float) -> Tensor:
    """Return (1 - share) x + share adapted, unit norm, in float32."""
    return F.normalize(torch.lerp(x_NE.float(), adapted_NE.float(), share), dim=-1)

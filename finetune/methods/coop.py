"""CoOp: learn the words around the class name (Zhou et al. 2022, arXiv:2109.01134).

The context is learned as embeddings, all else is frozen. Gradients run through the frozen text tower, whose features
are computed once a step; `chunk` bounds what they keep.
Shapes: K = classes, T = tokens, M = context tokens, C = width of the text tower, E = joint width, N = images.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from finetune.layers import prompt
from finetune.layers.class_shards import over_ranks
from finetune.methods import base
from pretrain.pretrained import Pretrained

LENGTH = 16


class Config(base.Config):
    """`method:` of CoOp; the defaults are the paper's."""

    length: int | None = Field(default=None, gt=0)  #: context tokens; null: as many as `words` has, or the paper's 16
    words: str | None = None  #: start from these words instead of noise, e.g. "a photo of a"
    position: prompt.Position = "end"  #: where the class name stands
    per_class: bool = False  #: a context of its own for every class (the paper's CSC)
    chunk: int | None = Field(default=None, gt=0)  #: classes whose activations are kept at once; null: all


class Method(base.Method):
    """Prompts with a learned context; 8,192 parameters for ViT-B/16 and 16 tokens."""

    serves = ("classify",)
    needs = ("image", "text", "text_embeds")
    trains = ("context.*",)
    pictures_by = "features"
    rates = (base.Rate("sgd", 2e-4, 2e-2),)
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        self.template, self.context = prompt.learner(
            pretrained, names, config, default=LENGTH, per_class=config.per_class
        )
        self.open_classes = not config.per_class
        if len(prompt.chunks(len(names), config.chunk)) > 1:
            prompt.recompute(self.model.text)

    @classmethod
    def epochs(cls, shots: int | None) -> int:
        """Return the paper's number of epochs: 50 for 1 shot, 100 for 2 and 4, 200 for more."""
        return {1: 50, 2: 100, 4: 100}.get(shots or 0, 200)

    def classes(self) -> Tensor:
        """Return unit-norm text features of the prompts [K, E]; each rank encodes its share of the classes."""
        prompts_KTC = self.template(self.context(len(self.names)))

        def encode(own_k: Tensor) -> Tensor:
            tokens_kT, prompts_kTC = self.template.tokens_KT[own_k], prompts_KTC[own_k]
            parts = prompt.chunks(len(own_k), self.config.chunk)
            return torch.cat([self.model.text(tokens_kT[part], embeds_BTC=prompts_kTC[part]).text_BE for part in parts])

        return F.normalize(over_ranks(encode, len(self.names)).float(), dim=-1)

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return scaled cosines [N, K]."""
        assert classes_KE is not None
        return base.scaled_cosines(self.scale_1, image_NE, classes_KE)

"""Full fine-tuning, and its weights mixed with the base's (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903).

    weights = (1 - wise) base + wise tuned

Classes are sentences around their names (head: text, after which the model still compares pictures and texts), or a
linear head that starts as these sentences (head: linear, as in the paper). The run keeps the tuned weights: another
`wise` needs no training.
Shapes: N = images, K = classes, E = joint width.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from finetune.layers.sentences import Sentences
from finetune.methods import base
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.pretrained import Pretrained

TRAINS = {
    "vision": ("model.vision.*",),
    "text": ("model.text.*",),
    "both": ("model.vision.*", "model.text.*", "model.logit_scale"),
}


class Config(base.Config):
    """`method:` of full fine-tuning; `wise` 0.5 is what the paper recommends where nothing else is known."""

    towers: Literal["vision", "text", "both"] = "vision"  #: what trains; both: the temperature too
    head: Literal["text", "linear"] = "text"  #: classes are texts, or rows of a matrix
    wise: float | None = Field(default=None, ge=0, le=1)  #: share of the tuned weights; null: they answer alone
    templates: str | list[str] | None = None  #: sentences of the classes; null: those of the task

    @model_validator(mode="after")
    def _head(self) -> "Config":
        if self.head == "linear" and self.towers != "vision":
            raise ValueError(
                f"head: linear reads no text, so towers={self.towers} has nothing to learn from; take vision"
            )
        return self


class Method(base.Method):
    """Towers that train as a whole."""

    serves = ("classify", "retrieve")
    needs = ("image", "text")
    trains = ("model.*", "head.*")
    rates = (
        base.Rate("adamw", 1e-7, 2e-4),
        base.Rate("sgd", 1e-5, 1e-2),
    )
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        linear = config.head == "linear"
        if linear and not names:
            raise ConfigError("method.head: a linear head names classes, of which this task has none; take text")
        fixed = config.towers == "vision"
        self.sentences = Sentences(pretrained, names, config.templates or base.TEMPLATES, frozen=fixed or linear)
        self.head = nn.Linear(pretrained.config.embed_dim, len(names), bias=False) if linear else None
        if self.head is not None:
            self.head.weight.data = self.scale_1 * self.sentences.alone(self.model.text)
        self.open_classes = not linear
        self.trains = (*TRAINS[config.towers], "head.*")
        mixes = config.wise is not None
        self._base = {name: p.detach().clone() for name, p in self.trained().items()} if mixes else {}

    @classmethod
    def epochs(cls, shots: int | None) -> int:
        """Return the paper's 10."""
        return 10

    def settle(self) -> None:
        """Mix with the base. Running statistics, of towers that have any, stay the tuned ones."""
        for name, p in self.trained().items() if self._base else ():
            assert self.config.wise is not None
            start = self._base[name].to(p.device)
            p.data.copy_(torch.lerp(start, p.data, self.config.wise))

    def classes(self) -> Tensor | None:
        """Return unit-norm text features [K, E], where the head is made of them."""
        if self.head is not None:
            return None
        features: Tensor = self.sentences(self.model.text)
        return features

    def classify(self, batch: Batch, classes_KE: Tensor | None) -> Tensor:
        """Return logits [N, K]."""
        seen = self.model(batch)
        if self.head is not None:
            with base.exact(seen.image):
                logits: Tensor = self.head(seen.image)
            return logits
        assert classes_KE is not None
        return base.scaled_cosines(seen.scale, seen.image, classes_KE)

    def merge(self) -> None:
        """Nothing is left to do: the base's own weights were trained.

        Raises:
            ConfigError: with a linear head, for which two towers have no place.
        """
        if self.head is not None:
            raise ConfigError(
                "method.head: a linear head has no place in a model of two towers; train with method.head=text, or "
                "use the run itself, with python -m finetune.evaluate"
            )

"""What trains for retrieval: a method's two towers under the contrastive loss of pretraining, as its Mixture has it."""

from typing import Any

from finetune.methods.base import Method
from pretrain.objectives import contrastive
from pretrain.objectives.base import Mixture


class Contrast(Mixture):
    """Pictures against captions (Radford et al. 2021, arXiv:2103.00020); what a method freezes stays frozen."""

    def __init__(self, method: Method) -> None:
        """Take a method whose parameters have been frozen or not."""
        super().__init__(method.model, {"contrastive": contrastive.Objective(contrastive.Config())})
        self._method: list[Any] = [method]  # not a child: its model is one already
        self.train(self.training)

    def train(self, mode: bool = True) -> "Contrast":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode; the method says which of its towers stay in eval mode."""
        super().train(mode)
        for method in getattr(self, "_method", ()):
            method.train(mode)
        return self

"""CoCoOp: a context that depends on the picture (Zhou et al. 2022, arXiv:2203.05557).

A small net turns the picture's unit-norm feature into a shift that is added to every context token, so that each
picture has prompts of its own: N x K texts a batch, encoded `chunk` classes at a time and again in backward. Sharing
the classes among W ranks, as CoOp does, would save nothing: a rank would get K / W classes for the pictures of all W
ranks, which are as many texts.
Shapes: N = images, K = classes, k = classes of a chunk, R = N k rows, T = tokens, M = context tokens,
C = width of the text tower, E = joint width.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.layers import prompt
from finetune.methods import base
from pretrain.pretrained import Pretrained

LENGTH = 4
REDUCTION = 16


class Config(base.Config):
    """`method:` of CoCoOp; the defaults are the paper's."""

    length: int | None = Field(default=None, gt=0)  #: context tokens; null: as many as `words` has, or 4
    words: str | None = "a photo of a"  #: start from these words; null: from noise
    position: prompt.Position = "end"  #: where the class name stands
    chunk: int | None = Field(default=64, gt=0)  #: classes at a time: pictures x chunk texts are in memory; null: all


class MetaNet(nn.Sequential):
    """From a picture's feature [N, E] to the shift of its context [N, C]."""

    def __init__(self, embed_dim: int, width: int) -> None:
        inner = max(1, embed_dim // REDUCTION)
        super().__init__(nn.Linear(embed_dim, inner), nn.ReLU(), nn.Linear(inner, width))


class Method(base.Method):
    """Prompts that see the picture; 35,360 parameters for ViT-B/16 and 4 tokens."""

    serves = ("classify",)
    needs = ("image", "text", "text_embeds")
    trains = ("context.*", "meta_net.*")
    pictures_by = "features"
    open_classes = True
    rates = (base.Rate("sgd", 2e-4, 2e-2),)
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        self.template, self.context = prompt.learner(pretrained, names, config, default=LENGTH)
        self.meta_net = MetaNet(pretrained.config.embed_dim, pretrained.config.text.width)
        self.parts = prompt.chunks(len(names), config.chunk)
        if len(self.parts) > 1:
            prompt.recompute(self.model.text)

    @classmethod
    def epochs(cls, shots: int | None) -> int:
        """Return the paper's 10."""
        return 10

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return scaled cosines [N, K] with the texts of each picture's own prompts."""
        shift_N1C = self.meta_net(image_NE)[:, None]
        context_NMC = self.context(len(image_NE)) + shift_N1C
        return torch.cat([self._logits(image_NE, context_NMC, part) for part in self.parts], dim=1)

    def _logits(self, image_NE: Tensor, context_NMC: Tensor, part: slice) -> Tensor:
        """Return the logits [N, k] of some classes."""
        tokens_kT = self.template.tokens_KT[part]
        prompts_RTC = self.template(context_NMC.repeat_interleave(len(tokens_kT), 0), classes=part)
        tokens_RT = tokens_kT.repeat(len(image_NE), 1)
        text_RE = self.model.text(tokens_RT, embeds_BTC=prompts_RTC).text_BE
        text_NkE = F.normalize(text_RE.float(), dim=-1).unflatten(0, (len(image_NE), -1))
        with base.exact(image_NE):
            return self.scale_1 * torch.einsum("ne,nke->nk", image_NE, text_NkE)

"""Class features from sentences around the class names: the zero-shot classifier as a module.

The feature of a class is the mean over templates of unit-norm text features, normalised again (Radford et al. 2021,
arXiv:2103.00020, section 3.1.4).
Shapes: S = sentences (templates x classes), K = classes, T = tokens, E = joint width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.layers.class_shards import over_ranks
from pretrain.batch import Example
from pretrain.config import ConfigError
from pretrain.data import prompts
from pretrain.pretrained import Pretrained

ROWS = 256  #: sentences at a time, where no gradient is wanted


class Sentences(nn.Module):
    """The tokens of every class's sentences; nothing of it is saved, it belongs to the class names."""

    tokens_ST: Tensor
    known_KE: Tensor | None

    def __init__(self, pretrained: Pretrained, names: list[str], templates: str | list[str], *, frozen: bool) -> None:
        """Spell the sentences; `frozen` says that the text tower does not change, so that they are encoded once.

        Raises:
            ConfigError: unknown templates, or a sentence that the text tower would not read to its end.
        """
        super().__init__()
        lines = [line for sentences in prompts.fill(names, templates) for line in sentences]
        refuse_long(pretrained, lines)
        rows = [pretrained.composer.row(Example(key=line, images=[], suffix=line), []) for line in lines]
        self.classes, self.frozen = len(names), frozen
        tokens_ST = pretrained.composer.collate(rows).tokens_BT if rows else torch.zeros(0, 1, dtype=torch.int64)
        self.register_buffer("tokens_ST", tokens_ST, persistent=False)
        self.register_buffer("known_KE", None, persistent=False)

    def forward(self, text: nn.Module) -> Tensor:
        """Return unit-norm features [K, E] that the tower `text` gives. All ranks call it, each encodes its share."""
        if not self.frozen:
            return over_ranks(lambda own_k: self._encode(text, own_k), self.classes)
        if self.known_KE is None:
            with torch.no_grad():
                self.known_KE = over_ranks(lambda own_k: self._encode(text, own_k), self.classes)
        return self.known_KE

    def alone(self, text: nn.Module) -> Tensor:
        """Return the features without the other ranks: where a method is built, which may be on no rank's device yet.

        A group of GPUs moves nothing that lies on the host.
        """
        with torch.no_grad():
            return self._encode(text, torch.arange(self.classes))

    def _encode(self, text: nn.Module, own_k: Tensor) -> Tensor:
        own_ST = self.tokens_ST.unflatten(0, (self.classes, -1))[own_k].flatten(0, 1)
        parts = own_ST.split(ROWS if self.frozen else len(own_ST))
        return self._mean(torch.cat([text(part_ST).text_BE for part_ST in parts]), len(own_k))

    def _mean(self, text_SE: Tensor, classes: int) -> Tensor:
        text_KtE = F.normalize(text_SE.float(), dim=-1).unflatten(0, (classes, -1))
        return F.normalize(text_KtE.mean(1), dim=-1)


def refuse_long(pretrained: Pretrained, lines: list[str]) -> None:
    """Raise a ConfigError for a sentence that would be cut off."""
    limit = pretrained.config.text.context_length
    for line in lines:
        need = len(pretrained.tokenizer.ids(line)) + 2
        if need > limit:
            raise ConfigError(
                f"task.templates: {line!r} needs {need} tokens, the text tower takes {limit}; shorten the class name "
                "or the template"
            )

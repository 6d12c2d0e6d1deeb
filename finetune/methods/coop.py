"""CoOp: learn the words around the class name (Zhou et al. 2022, arXiv:2109.01134).

The prompt of a class is [start | context | name . end]; the context is learned as embeddings, all else is frozen. The
class name may stand at the end, in the middle or at the front: a permutation that leaves the end token where it is.
Gradients run through the frozen text tower, whose features are computed once a step.
Shapes: K = classes, T = tokens, M = context tokens, C = width of the text tower, E = joint width, N = images.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.methods import base
from pretrain.config import ConfigError
from pretrain.data.tokenizer import Tokenizer
from pretrain.pretrained import Pretrained

LENGTH = 16


class Config(base.Config):
    """`method:` of CoOp; the defaults are the paper's."""

    length: int | None = Field(default=None, gt=0)  #: context tokens; null: as many as `words` has, or the paper's 16
    words: str | None = None  #: start from these words instead of noise, e.g. "a photo of a"
    position: Literal["end", "middle", "front"] = "end"  #: where the class name stands
    per_class: bool = False  #: a context of its own for every class (the paper's CSC)


class Context(nn.Module):
    """The learned embeddings. A module of its own: ZeRO-3 gathers the parameters of a module that is called."""

    def __init__(self, start_MC: Tensor, *, classes: int | None) -> None:
        super().__init__()
        self.words = nn.Parameter(start_MC.clone() if classes is None else start_MC.expand(classes, -1, -1).clone())

    def forward(self, classes: int) -> Tensor:
        """Return [K, M, C]."""
        return self.words if self.words.ndim == 3 else self.words.expand(classes, -1, -1)


class Method(base.Method):
    """Prompts with a learned context; 8,192 parameters for ViT-B/16 and 16 tokens."""

    serves = ("classify",)
    needs = ("image", "text", "text_embeds")
    trains = ("context.*",)
    pictures_by = "features"
    config: Config

    def __init__(self, config: Config, pretrained: Pretrained, names: list[str]) -> None:
        super().__init__(config, pretrained, names)
        self.open_classes = not config.per_class
        tokenizer, text = pretrained.tokenizer, pretrained.model.text
        given = tokenizer.ids(config.words) if config.words else None
        length = len(given) if given else config.length or LENGTH
        if given and config.length not in (None, length):
            raise ConfigError(
                f"method.length: {config.words!r} has {length} tokens, not {config.length}; leave method.length out"
            )
        prompts = [_words(tokenizer, config.words, name) for name in names]
        _refuse_long(names, prompts, length, limit=text.config.context_length)
        tokens_KT, place_KT = layout(tokenizer, prompts, length, config.position)
        with torch.no_grad():
            start_MC = text.embed(torch.tensor(given)) if given else 0.02 * torch.randn(length, text.config.width)
            frozen_KTC = text.embed(tokens_KT)
        self.context = Context(start_MC, classes=len(names) if config.per_class else None)
        self.register_buffer("tokens_KT", tokens_KT, persistent=False)  # they belong to the class names: never saved
        self.register_buffer("place_KT", place_KT, persistent=False)
        self.register_buffer("frozen_KTC", frozen_KTC, persistent=False)

    @classmethod
    def epochs(cls, shots: int | None) -> int:
        """Return the paper's number of epochs: 50 for 1 shot, 100 for 2 and 4, 200 for more."""
        return {1: 50, 2: 100, 4: 100}.get(shots or 0, 200)

    def prompts(self) -> Tensor:
        """Return the prompts' embeddings [K, T, C]: context token m where place_KT is m >= 0, else the frozen word."""
        context_KMC = self.context(len(self.names))
        index_KTC = self.place_KT.clamp(min=0)[..., None].expand(-1, -1, context_KMC.shape[-1])
        return torch.where(self.place_KT[..., None] >= 0, context_KMC.gather(1, index_KTC), self.frozen_KTC)

    def classes(self) -> Tensor:
        """Return unit-norm text features of the prompts [K, E]."""
        out_KE = self.model.text(self.tokens_KT, embeds_BTC=self.prompts()).text_BE
        return F.normalize(out_KE.float(), dim=-1)

    def classify_features(self, image_NE: Tensor, classes_KE: Tensor | None) -> Tensor:
        """Return scaled cosines [N, K]."""
        assert classes_KE is not None
        return self.scale_1 * image_NE @ classes_KE.T


def _refuse_long(names: list[str], prompts: list[tuple[list[int], list[int]]], length: int, *, limit: int) -> None:
    for name, (name_ids, rest_ids) in zip(names, prompts):
        need = 2 + length + len(name_ids) + len(rest_ids)
        if need > limit:
            raise ConfigError(
                f"method coop: the prompt of class {name!r} needs {need} tokens, the text tower takes {limit}; "
                "shorten the class name, or lower method.length"
            )


def _words(tokenizer: Tokenizer, words: str | None, name: str) -> tuple[list[int], list[int]]:
    """Return the ids of a class name inside its sentence, and of the full stop after it.

    A tokenizer may spell a word at the start of a text differently from one after a space: the name is always read
    behind other words.
    """
    lead = words or "a"
    head = tokenizer.ids(lead)
    spoken, whole = tokenizer.ids(f"{lead} {name}"), tokenizer.ids(f"{lead} {name}.")
    if whole[: len(head)] != head or whole[: len(spoken)] != spoken or len(spoken) == len(head):
        raise ConfigError(
            f"method coop: the tokenizer joins class name {name!r} with the words around it; "
            "rename the class, or end method.words with a whole word"
        )
    return spoken[len(head) :], whole[len(spoken) :]


def layout(
    tokenizer: Tokenizer, prompts: list[tuple[list[int], list[int]]], length: int, position: str
) -> tuple[Tensor, Tensor]:
    """Return token ids [K, T] and, at each place, which context token stands there [K, T] (-1: none).

    The ids at the places of the context are placeholders; T is the longest prompt, as causal text never looks right of
    its end token.
    """
    assert tokenizer.start is not None and tokenizer.end is not None, "the native text tower has both"
    rows = []
    for name_ids, rest_ids in prompts:
        name = [(i, -1) for i in name_ids]
        context = [(tokenizer.start, m) for m in range(length)]  # not pad: CLIP pads with the end token
        half = length // 2
        body = {
            "end": [*context, *name],
            "middle": [*context[:half], *name, *context[half:]],
            "front": [*name, *context],
        }[position]
        rows.append([(tokenizer.start, -1), *body, *((i, -1) for i in rest_ids), (tokenizer.end, -1)])
    longest = max(len(row) for row in rows)
    filled = torch.tensor([row + [(tokenizer.pad, -1)] * (longest - len(row)) for row in rows])
    return filled[..., 0].contiguous(), filled[..., 1].contiguous()

"""The learned words of a prompt, and the places in every class's sentence where they stand (CoOp, arXiv:2109.01134).

The prompt of a class is [start | context | name . end]; the class name may stand at the end, in the middle or at the
front of the context: a permutation that leaves the end token where it is.
Shapes: K = classes, R = rows, T = tokens, M = context tokens, C = width of the text tower, E = joint width.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.data.tokenizer import Tokenizer
from pretrain.models.blocks import Recomputed
from pretrain.pretrained import Pretrained

Position = Literal["end", "middle", "front"]


class Prompted(Protocol):
    """What a method's section says of its prompts."""

    @property
    def words(self) -> str | None: ...
    @property
    def length(self) -> int | None: ...
    @property
    def position(self) -> Position: ...


class Context(nn.Module):
    """The learned embeddings. A module of its own: ZeRO-3 gathers the parameters of a module that is called."""

    def __init__(self, start_MC: Tensor, *, classes: int | None) -> None:
        super().__init__()
        self.words = nn.Parameter(start_MC.clone() if classes is None else start_MC.expand(classes, -1, -1).clone())

    def forward(self, classes: int) -> Tensor:
        """Return [K, M, C]."""
        return self.words if self.words.ndim == 3 else self.words.expand(classes, -1, -1)


class Template(nn.Module):
    """The prompts of all classes with gaps for the context. Its buffers belong to the class names: never saved."""

    tokens_KT: Tensor
    place_KT: Tensor
    frozen_KTC: Tensor

    def __init__(
        self, pretrained: Pretrained, names: list[str], *, words: str | None, length: int, position: Position
    ) -> None:
        """Lay the prompts out around `length` context tokens, which `words` would spell.

        Raises:
            ConfigError: a prompt is longer than the text tower reads, or the tokenizer joins a name with its sides.
        """
        super().__init__()
        tokenizer, text = pretrained.tokenizer, pretrained.model.text
        prompts = [spelt(tokenizer, words, name) for name in names]
        refuse_long(names, prompts, length, limit=text.config.context_length)
        tokens_KT, place_KT = layout(tokenizer, prompts, length, position)
        with torch.no_grad():
            frozen_KTC = text.embed(tokens_KT)
        self.register_buffer("tokens_KT", tokens_KT, persistent=False)
        self.register_buffer("place_KT", place_KT, persistent=False)
        self.register_buffer("frozen_KTC", frozen_KTC, persistent=False)

    def forward(self, context_RMC: Tensor, *, classes: slice = slice(None)) -> Tensor:
        """Return prompts' embeddings [R, T, C]: context token m where place_KT is m >= 0, else the frozen word.

        The rows of `context_RMC` are those of `classes`, once or, one picture after the other, several times.
        """
        times = len(context_RMC) // len(self.place_KT[classes])
        place_RT1 = self.place_KT[classes].repeat(times, 1)[..., None]
        index_RTC = place_RT1.clamp(min=0).expand(-1, -1, context_RMC.shape[-1])
        frozen_RTC = self.frozen_KTC[classes].repeat(times, 1, 1)
        if not context_RMC.shape[1]:
            return frozen_RTC
        return torch.where(place_RT1 >= 0, context_RMC.gather(1, index_RTC), frozen_RTC)


def learner(
    pretrained: Pretrained, names: list[str], config: Prompted, *, default: int, per_class: bool = False
) -> tuple[Template, Context]:
    """Return the classes' prompts, and the context that is learned for them: one for all, or one for each.

    Raises:
        ConfigError: `config` and the class names do not fit each other, or the text tower.
    """
    start_MC = start(pretrained, config.words, length=config.length, default=default)
    template = Template(pretrained, names, words=config.words, length=len(start_MC), position=config.position)
    return template, Context(start_MC, classes=len(names) if per_class else None)


def start(pretrained: Pretrained, words: str | None, *, length: int | None, default: int) -> Tensor:
    """Return the context's first embeddings [M, C]: those of `words`, or noise of the spread that CoOp has.

    Raises:
        ConfigError: `words` has another number of tokens than `length`.
    """
    text = pretrained.model.text
    if not words:
        return 0.02 * torch.randn(length or default, text.config.width)
    given = pretrained.tokenizer.ids(words)
    if length not in (None, len(given)):
        raise ConfigError(f"method.length: {words!r} has {len(given)} tokens, not {length}; leave method.length out")
    with torch.no_grad():
        return text.embed(torch.tensor(given)).clone()


def chunks(classes: int, size: int | None) -> list[slice]:
    """Return the classes in parts of `size`; None: in one."""
    return [slice(at, min(at + (size or classes), classes)) for at in range(0, classes, size or classes)]


def recompute(text: nn.Module) -> None:
    """Let a text tower keep its input only and run again in backward: memory is that of one part of the classes."""
    if not isinstance(text.forward, Recomputed):
        text.forward = Recomputed(text.forward)  # type: ignore[method-assign]


def refuse_long(names: list[str], prompts: list[tuple[list[int], list[int]]], length: int, *, limit: int) -> None:
    """Raise a ConfigError for a prompt that the text tower would not read to its end."""
    for name, (name_ids, rest_ids) in zip(names, prompts):
        need = 2 + length + len(name_ids) + len(rest_ids)
        if need > limit:
            raise ConfigError(
                f"method.length: the prompt of class {name!r} needs {need} tokens, the text tower takes {limit}; "
                "shorten the class name, or lower method.length"
            )


def spelt(tokenizer: Tokenizer, words: str | None, name: str) -> tuple[list[int], list[int]]:
    """Return the ids of a class name inside its sentence, and of the full stop after it.

    A tokenizer may spell a word at the start of a text differently from one after a space: the name is always read
    behind other words.
    """
    lead = words or "a"
    head = tokenizer.ids(lead)
    spoken, whole = tokenizer.ids(f"{lead} {name}"), tokenizer.ids(f"{lead} {name}.")
    if whole[: len(head)] != head or whole[: len(spoken)] != spoken or len(spoken) == len(head):
        raise ConfigError(
            f"method.words: the tokenizer joins class name {name!r} with the words around it; "
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

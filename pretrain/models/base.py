"""What a model is to the rest: Config, Vocabulary, Model; and what one that writes text offers beside it (Writer).

A model file (vlm, coca, vlt5, ofa) offers `Config` and `Model`; its module name is `model.name` in a config. DeepSpeed
wraps one forward: `model(batch)` returns what objectives and evals read, each property computed when first asked for.
Shapes: B = rows, S = states of the memory (image and source tokens), U = tokens written so far, V = vocabulary,
C = width.
"""

from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config import ConfigError, Section
from pretrain.models.cache import Cache
from pretrain.models.depth import Depth


class Vocabulary(NamedTuple):
    """What a model must know of its tokenizer."""

    size: int  #: ids, the model's own symbols included
    end: int
    pad: int
    start: int | None = None
    mask: int | None = None


class Look(NamedTuple):
    """How a model wants its pictures."""

    size: int  #: pixels a side
    interpolation: str = "bicubic"
    sizes: bool = False  #: it reads pictures of other sizes too


class Config(Section):
    """Base of `model:`; a subclass fixes `name` to its file's."""

    name: str
    tokenizer: str = "clip"  #: `clip`, or a transformers tokenizer folder

    @property
    def file(self) -> str:
        """Return which file of pretrain/models has the class."""
        return self.name

    @property
    def look(self) -> Look:
        """Return how pictures are prepared."""
        raise NotImplementedError

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Return the most tokens of the text that is given, and of the one that a decoder writes (None: no decoder)."""
        raise NotImplementedError

    @property
    def beyond(self) -> int:
        """Return how many tokens can be written beyond the places that a text has: the last one needs none."""
        return 1

    @property
    def pictures(self) -> tuple[int, str] | None:
        """Return the most pictures of a row, and what to do about a sample with more; None: any number."""
        return None

    @property
    def vocabulary_size(self) -> int | None:
        """Return the ids that the config itself fixes; None: as many as the tokenizer has."""
        return None

    @property
    def regions(self) -> tuple[int, int] | None:
        """Return the most boxes of a row and the numbers of a box's feature; None: no detector's features are read."""
        return None

    def grid(self) -> tuple[int, int] | None:
        """Return the rows and columns of cells that it can name, of a picture; None: it names none."""
        return None

    @property
    def picture_codes(self) -> int | None:
        """Return how many codes a picture that is written has; None: none is written."""
        return None

    @property
    def joint_width(self) -> int:
        """Return the numbers of a feature that rows are compared by; 0 where none are."""
        return 0

    @property
    def from_scratch(self) -> bool:
        """Return whether all weights are drawn, none read from a file."""
        return True

    @property
    def read_from_files(self) -> tuple[str, ...]:
        """Return the first parts of the names of weights that building the model reads from files of its own."""
        return ()

    @property
    def recomputable(self) -> tuple[str, ...]:
        """Return the overrides that would let backward recompute what it now keeps."""
        return ()

    def bare(self) -> Self:
        """Return what the model is, without how it is trained (recomputation, patch dropout)."""
        return self.model_copy(deep=True)

    def without_files(self, names: Collection[str]) -> Self:
        """Return the config without the files of weights that these weights replace: they need not exist any more."""
        return self

    def architecture(self) -> dict[str, Any]:
        """Return what must not change when a run goes on, as JSON holds it; the tokenizer is compared apart."""
        return self.model_dump(mode="json", exclude={"tokenizer"})

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return what the model adds to the tokenizer's vocabulary (sentinels, codes, bins), in the order of ids."""
        return ()

    def opening(self, words: Vocabulary) -> tuple[int, ...]:
        """Return the tokens that a decoder starts from: the start token, or the padding where there is none (T5)."""
        return (words.pad if words.start is None else words.start,)


def with_vocabulary(config: Any, words: Vocabulary, *, counted: str = "") -> Any:
    """Return a config whose `text` holds as many ids as the tokenizer; `counted` says what is among these.

    Raises:
        ConfigError: it has room for fewer.
    """
    section = config.model_copy(deep=True)
    if section.text.vocab_size is None:
        section.text.vocab_size = words.size
    if section.text.vocab_size < words.size:
        raise ConfigError(
            f"model.text.vocab_size: {section.text.vocab_size} is too small, the tokenizer {config.tokenizer} "
            f"has {words.size} ids{counted}; leave it out to take the tokenizer's size"
        )
    return section


class Model(nn.Module):
    """Base of every model."""

    #: image, text: unit-norm features; fuse: text that reads pictures; cloze: it can also be read both ways and has a
    #: mask token; match: whether text and picture belong together; seq2seq; generate: it is a Writer
    provides: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, config: Any, words: Vocabulary) -> Self:
        """Return a freshly initialised model.

        Raises:
            ConfigError: config and vocabulary do not belong together.
        """
        raise NotImplementedError

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of a tower lies, by name, for layer-wise decay; what is in none is left out."""
        return {}

    def forward(self, batch: Batch) -> Any:
        """Return what is computed of a batch, lazily; a model that provides seq2seq offers `logits_BUV` there."""
        raise NotImplementedError


class Memory(NamedTuple):
    """What a decoder reads: encoded once, kept while it writes."""

    states_BSC: Tensor
    valid_BS: Tensor  #: bool, False on padding
    beside: dict[str, Tensor] = {}  # noqa: RUF012  #: what else a model needs of each row, rows first

    def rows(self, index_B: Tensor) -> "Memory":
        """Return the memory of these rows, in this order; a row may come often, as in a beam."""
        beside = {name: value[index_B] for name, value in self.beside.items()}
        return Memory(self.states_BSC[index_B], self.valid_BS[index_B], beside)


class Writer(Model):
    """A model that writes text token by token; `provides` names "generate"."""

    first: tuple[int, ...]  #: the tokens that a decoder starts from
    end: int  #: the token that ends what it writes

    def remember(self, batch: Batch) -> Memory:
        """Return what the decoder reads of a batch: pictures and the given text."""
        raise NotImplementedError

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V] of the token after each of these.

        With a cache the tokens follow those that it holds, whose keys and values are not computed again.
        """
        raise NotImplementedError

    def room(self, memory: Memory) -> Tensor | None:
        """Return how many tokens it can write in each row [B], the end token among them; None: as many as it may."""
        return None

    def refuse_longer(self, memory: Memory, tokens_B: Tensor) -> None:
        """Raise a ConfigError where a row is to have more tokens than the model has places for."""
        room_B = self.room(memory)
        if room_B is not None and bool((tokens_B > room_B).any()):
            row = int((tokens_B - room_B).argmax())
            raise ConfigError(
                f"model.text.context_length: {int(tokens_B[row])} tokens, the end among them, do not fit behind what "
                f"is given, where the model has places for {int(room_B[row])}; write less, or shorten the prompt"
            )

"""What the T5 and BART stacks share: sizes, the word table that is also the head, and what a joint encoder offers.

Shapes: B = rows, L = source tokens, N = visual tokens, S = L + N states of the memory, U = tokens of the decoder,
C = width, V = vocabulary.
"""

from typing import Any, Literal

from pydantic import Field, StrictBool, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import Section
from pretrain.models.base import Memory
from pretrain.models.cache import Cache


class Config(Section):
    """`model.text`: which encoder-decoder, its sizes (here T5-base's) and what it starts from."""

    backbone: Literal["t5", "bart"] = "t5"
    vocab_size: int | None = Field(default=None, gt=0)  #: None: as many as the tokenizer has
    width: int = Field(default=768, gt=0)
    layers: int = Field(default=12, gt=0)  #: of the encoder, and as many of the decoder
    heads: int = Field(default=12, gt=0)
    head_width: int | None = Field(default=None, gt=0)  #: of T5, where it is not width / heads
    hidden: int = Field(default=3072, gt=0)  #: width inside the feed-forward half
    dropout: float = Field(default=0.1, ge=0, lt=1)  #: of states, attention and activations
    positions: int = Field(default=1024, gt=0)  #: rows of BART's tables of positions; T5's are relative
    source_length: int = Field(default=20, gt=1)  #: most tokens of the text that is given
    target_length: int = Field(default=20, gt=1)  #: most tokens that the decoder writes
    weights: str | None = None  #: hf:FOLDER of a T5 or BART, or a file of a released VL-T5 or VL-BART
    checkpointing: StrictBool | int = Field(default=False, ge=0)  #: recompute each block in backward, or one in so many

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.backbone == "bart" and self.head_width is not None:
            raise ValueError("head_width is T5's; BART's heads are width / heads wide, leave it out")
        if (self.backbone == "bart" or self.head_width is None) and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        longest = max(self.source_length, self.target_length)
        if self.backbone == "bart" and longest > self.positions:
            raise ValueError(f"positions: {self.positions} rows are too few for texts of {longest} tokens")
        return self


class WordTable(nn.Embedding):
    """One matrix [V, C] for words, for the sentinels of regions and, turned round, for the head.

    All three go through one forward, since ZeRO-3 gathers a matrix by the hooks of the module that owns it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows [..., C] of ids [...], or the logits [..., V] of states [..., C]."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class EncoderDecoder(nn.Module):
    """A text encoder-decoder whose encoder also reads visual tokens; `shared` is its word table."""

    shared: WordTable

    def encode(
        self, tokens_BL: Tensor, valid_BL: Tensor, visual_BNC: Tensor | None = None, valid_BN: Tensor | None = None
    ) -> Memory:
        """Return the states of [text | vision]; both masks are False where there is nothing."""
        raise NotImplementedError

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V] of the token after each of these, which follow those of the cache."""
        raise NotImplementedError


def heads(x_BTC: Tensor, count: int) -> Tensor:
    """Return [B, T, H * D] as [B, H, T, D]."""
    return x_BTC.unflatten(-1, (count, -1)).transpose(1, 2)


def dropped(p: float, module: nn.Module) -> float:
    """Return the dropout that a module applies now."""
    return p if module.training else 0.0


def initialise(modules: Any, std: float) -> None:
    """Draw linears and tables from N(0, std), biases zero: BART's initialisation."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

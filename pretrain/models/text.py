"""Text towers: the native CLIP text transformer (takes ids or embeddings) and `hf:` encoders.

Shapes: B = rows, T = tokens, C = tower width, E = joint embedding width, V = vocabulary; S = tokens with those kept
from earlier calls.
"""

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field, StrictBool, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import ConfigError, Section
from pretrain.models import blocks, depth
from pretrain.models.attention import Block
from pretrain.models.cache import Cache
from pretrain.models.depth import Depth


class Config(Section):
    """`model.text`: the native tower's size, or `hf:FOLDER` of a transformers encoder."""

    name: str = "native"  #: native, or hf:FOLDER with config.json and weights
    context_length: int = Field(default=77, gt=2)
    vocab_size: int | None = None  #: None: as many as the tokenizer has
    width: int = Field(default=512, gt=0)
    layers: int = Field(default=12, gt=0)
    heads: int = Field(default=8, gt=0)
    mlp_ratio: float = 4.0
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    pool: Literal["mean", "cls"] = "mean"  #: hf: towers; the native tower pools at the end token
    frozen: bool = False  #: the encoder stays as it is, the projection trains
    unlocked_blocks: int = Field(default=0, ge=0)  #: with frozen: so many of the last blocks train nevertheless
    checkpointing: StrictBool | int = Field(default=False, ge=0)  #: recompute each block in backward, or one in so many

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.unlocked_blocks and not self.frozen:
            raise ValueError("unlocked_blocks says what a frozen tower trains; set frozen=true or leave it out")
        return self


class Output(NamedTuple):
    """What a text tower computes in one pass."""

    tokens_BTC: Tensor  #: after the final norm
    text_BE: Tensor  #: projected, not normalised


class Words(nn.Embedding):
    """Word embeddings that are read both ways, ids to vectors and states to scores of words.

    Both are calls of the module, since ZeRO-3 gathers weights where a module is called.
    """

    def forward(self, input: Tensor, *, score: bool = False) -> Tensor:
        """Return embeddings [B, T, C] of ids [B, T]; with `score` logits [B, T, V] of states [B, T, C]."""
        return F.linear(input, self.weight) if score else super().forward(input)


class NativeText(nn.Module):
    """CLIP's causal text transformer (Radford et al. 2021, arXiv:2103.00020, section 2.4), pooled at the end token."""

    def __init__(self, config: Config, embed_dim: int, *, end: int) -> None:
        super().__init__()
        assert config.vocab_size, "the recipe fills vocab_size from the tokenizer"
        self.config, self.end = config, end
        width = config.width
        self.token_embedding = Words(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, mlp_ratio=config.mlp_ratio, activation=config.activation)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self._initialise()
        if config.frozen:
            depth.lock(self, config.unlocked_blocks, key="model.text.unlocked_blocks")
            self.projection.requires_grad_(requires_grad=True)
        blocks.recompute(self, config.checkpointing, key="model.text.checkpointing")

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter lies."""
        return depth.of_tower(self, self, "text")

    def _initialise(self) -> None:
        """Set the spreads of CLIP's code: out and down shrink with depth, so that the residual sum does not grow."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.down.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            for linear in (block.attention.qkv, block.attention.out):
                nn.init.zeros_(linear.bias)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return token embeddings [B, T, C] without positions: where prompts of other methods are spliced in."""
        return self.token_embedding(tokens_BT)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        embeds_BTC: Tensor | None = None,
        mask_B1TS: Tensor | None = None,
        places_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Return states [B, T, C] and the projected feature [B, E].

        Args:
            tokens_BT: say where the end token is; causal text never looks right of it, so needs no mask of padding.
            embeds_BTC: replaces the embeddings looked up.
            mask_B1TS: which token reads which, for models that fuse; None: causal. The feature is that of causal text.
            places_BT: positions; None: counted from 0.
            cache: keys and values of earlier tokens; those of these are added.
        """
        x_BTC = self.embed(tokens_BT) if embeds_BTC is None else embeds_BTC
        x_BTC = self._through(self._placed(x_BTC, places_BT), mask_B1TS, cache)
        end_B = (tokens_BT == self.end).int().argmax(1)  # the first one: padding may repeat it
        pooled_BC = x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), end_B]
        return Output(x_BTC, self.projection(pooled_BC))

    def _placed(self, x_BTC: Tensor, places_BT: Tensor | None) -> Tensor:
        here = slice(x_BTC.shape[1]) if places_BT is None else places_BT
        return x_BTC + self.positional_embedding[here]

    def _through(self, x_BTC: Tensor, mask_B1TS: Tensor | None, cache: Cache | None) -> Tensor:
        for number, block in enumerate(self.blocks):
            if cache is None:
                x_BTC = block(x_BTC, mask_B1TS)
            else:
                x_BTC = block(x_BTC, mask_B1TS, keep=partial(cache.grow, f"text.{number}"))
        return self.norm(x_BTC)


class HfText(nn.Module):
    """A transformers encoder (BERT and its kin) with mean or first-token pooling and a linear projection."""

    def __init__(self, config: Config, embed_dim: int, *, pad: int) -> None:
        super().__init__()
        self.config, self.pad = config, pad
        self.encoder = _encoder(config.name.removeprefix("hf:"))
        self.projection = nn.Linear(self.encoder.config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=self.encoder.config.hidden_size**-0.5)
        self._open: list[nn.Module] = []  # blocks of a frozen encoder that train
        if config.frozen:
            self._open = depth.lock(self.encoder, config.unlocked_blocks, key="model.text.unlocked_blocks")
        blocks.recompute(self.encoder, config.checkpointing, key="model.text.checkpointing")
        self.train()

    def train(self, mode: bool = True) -> "HfText":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Switch mode; what is frozen stays in eval mode, without dropout."""
        super().train(mode)
        if self.config.frozen:
            self.encoder.eval()
            for block in self._open:
                block.train(mode)
        return self

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter lies."""
        return depth.of_tower(self, self.encoder, "text")

    def forward(self, tokens_BT: Tensor) -> Output:
        """Return states [B, T, C] and the projected feature [B, E]."""
        valid_BT = tokens_BT != self.pad
        x_BTC = self.encoder(input_ids=tokens_BT, attention_mask=valid_BT.long()).last_hidden_state
        if self.config.pool == "cls":
            return Output(x_BTC, self.projection(x_BTC[:, 0]))
        weight_BT1 = valid_BT[..., None].to(x_BTC.dtype)
        return Output(x_BTC, self.projection((x_BTC * weight_BT1).sum(1) / weight_BT1.sum(1)))


def _encoder(folder: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"model.text.name: {folder}/config.json does not exist; give hf: a transformers folder")
    weights = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin")]
    options = {"add_pooling_layer": False} if AutoConfig.from_pretrained(folder).model_type == "bert" else {}
    if not weights:
        raise ConfigError(f"model.text.name: no weights (*.safetensors) in {folder}")
    return AutoModel.from_pretrained(folder, local_files_only=True, **options)


def build(config: Config, embed_dim: int, *, end: int, pad: int) -> nn.Module:
    """Return the text tower that the config names."""
    if config.name == "native":
        return NativeText(config, embed_dim, end=end)
    if config.name.startswith("hf:"):
        return HfText(config, embed_dim, pad=pad)
    raise ConfigError(f"model.text.name: {config.name!r} is neither `native` nor `hf:FOLDER`")

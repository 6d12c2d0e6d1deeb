"""The vision-language model and Encodings: every feature is computed at most once a step.

Shapes: N = images, B = rows, T = tokens, P = patches, C = width, E = joint embedding width.
"""

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import base
from pretrain.models import fusion as fusions
from pretrain.models import text as text_towers
from pretrain.models import vision as vision_towers
from pretrain.models.depth import Depth

MASK = "<mask>"


class Config(base.Config):
    """`model:` towers, joint width, tokenizer and the learned temperature; with `fusion`, text that reads pictures."""

    name: Literal["vlm"] = "vlm"
    vision: vision_towers.Config = Field(default_factory=vision_towers.Config)
    text: text_towers.Config = Field(default_factory=text_towers.Config)
    fusion: fusions.Config | None = None  #: None: two towers, as CLIP has them
    embed_dim: int = Field(default=512, gt=0)
    logit_scale: float = math.log(1 / 0.07)  #: start of the learned log temperature (CLIP; SigLIP: ln 10)
    logit_bias: float | None = None  #: start of the learned bias (SigLIP: -10)

    @model_validator(mode="after")
    def _native(self) -> "Config":
        if self.fusion and self.text.name != "native":
            raise ValueError(
                f"fusion needs the native text tower, which runs under any mask; {self.text.name} does not"
            )
        return self

    @property
    def file(self) -> str:
        """Return where the model's class is."""
        return "fused_vlm" if self.fusion else "vlm"

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return the mask token, where words are hidden."""
        return (MASK,) if self.fusion else ()

    @property
    def look(self) -> base.Look:
        """Return how pictures are prepared."""
        return base.Look(self.vision.image_size, self.vision.interpolation)

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Return the most tokens of a text; there is no decoder."""
        return self.text.context_length, None

    @property
    def beyond(self) -> int:
        """Return 0 where words are said at a mask, which takes a place; else 1."""
        return 0 if self.fusion and self.fusion.predict == "masked" else 1

    @property
    def vocabulary_size(self) -> int | None:
        """Return the rows of the text tower's table."""
        return self.text.vocab_size

    @property
    def joint_width(self) -> int:
        """Return the width of the joint space."""
        return self.embed_dim

    @property
    def from_scratch(self) -> bool:
        """Return whether neither tower is read from a file."""
        return not self.vision.weights and not self.text.name.startswith("hf:")

    @property
    def read_from_files(self) -> tuple[str, ...]:
        """Return where a transformers encoder and a trunk with a file of weights lie."""
        return ("text.encoder.", "vision.trunk.") if self.vision.weights else ("text.encoder.",)

    @property
    def recomputable(self) -> tuple[str, ...]:
        """Return the overrides that let backward recompute the towers."""
        parts = {"vision": self.vision, "text": self.text, **({"fusion": self.fusion} if self.fusion else {})}
        if all(part.checkpointing for part in parts.values()):
            return ()
        return (", ".join(f"model.{name}.checkpointing=true" for name in parts),)

    def bare(self) -> "Config":
        """Return the towers without recomputation and patch dropout."""
        out = self.model_copy(deep=True)
        out.vision.checkpointing, out.text.checkpointing, out.vision.patch_dropout = False, False, 0.0
        if out.fusion:
            out.fusion.checkpointing = False
        return out

    def without_files(self, names: Collection[str]) -> "Config":
        """Return the config without the trunk's file, where the trunk's weights are among these."""
        out = self.model_copy(deep=True)
        if vision_towers.among(names, "vision.trunk."):
            out.vision.weights = None
        return out

    def architecture(self) -> dict[str, Any]:
        """Return the towers, as checkpoints have named them from the first."""
        beside = {"checkpointing", "patch_dropout"}  # how it is trained
        left = {"name": True, "tokenizer": True, "vision": beside, "text": beside, "fusion": beside}
        tree = self.model_dump(mode="json", exclude=left)
        if self.fusion is None:  # older checkpoints have no such key
            del tree["fusion"]
        for tower in (tree["vision"], tree["text"]):
            if not tower["unlocked_blocks"]:  # older checkpoints have no such key
                del tower["unlocked_blocks"]
        return tree


class VLM(base.Model):
    """Two towers and a temperature (CLIP, Radford et al. 2021, arXiv:2103.00020)."""

    provides = ("image", "text")
    MAX_LOGIT_SCALE = math.log(100.0)

    def __init__(self, config: Config, *, end: int, pad: int) -> None:
        super().__init__()
        self.config = config
        self.vision, self.text = self._towers(config, end=end, pad=pad)
        self.logit_scale = nn.Parameter(torch.tensor([config.logit_scale]))  # [1]: DeepSpeed fails on 0-dim
        self.logit_bias = None if config.logit_bias is None else nn.Parameter(torch.tensor([config.logit_bias]))

    @classmethod
    def build(cls, config: Config, words: base.Vocabulary) -> "VLM":
        """Return a freshly initialised model whose vocabulary is the tokenizer's."""
        return cls(base.with_vocabulary(config, words), end=words.end, pad=words.pad)

    @staticmethod
    def _towers(config: Config, *, end: int, pad: int) -> tuple[nn.Module, nn.Module]:
        vision = vision_towers.VisionTower(config.vision, config.embed_dim)
        return vision, text_towers.build(config.text, config.embed_dim, end=end, pad=pad)

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale) in float32, [1]; clamped here, since ZeRO's master copy undoes a clamp on the parameter."""
        return self.logit_scale.float().clamp(max=self.MAX_LOGIT_SCALE).exp()

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of a tower lies, by name; the temperature is in none."""
        return {
            f"{name}.{key}": found
            for name, tower in (("vision", self.vision), ("text", self.text))
            for key, found in tower.depths().items()
        }

    def forward(self, batch: Batch) -> "Encodings":
        """Return the lazily computed features of a batch."""
        return Encodings(self, batch)


Model = VLM


class Encodings:
    """What a model knows of a batch: each property is computed when first asked for, then kept."""

    def __init__(self, model: VLM, batch: Batch) -> None:
        self.model, self.batch = model, batch

    @cached_property
    def _vision(self) -> vision_towers.Output:
        assert self.batch.image_NCHW is not None, "the batch has no images"
        with record_function("image tower"):
            return self.model.vision(self.batch.image_NCHW, draw_N=self._draw_N)

    @property
    def _draw_N(self) -> Tensor | None:
        """The hash of each image's sample; a row's further images have hashes of their own."""
        draw_B, owner_N = self.batch.draw_B, self.batch.owner_N
        if draw_B is None or owner_N is None:
            return draw_B
        return (
            draw_B[owner_N] + torch.arange(len(owner_N), device=owner_N.device) - torch.searchsorted(owner_N, owner_N)
        )

    @cached_property
    def _text(self) -> text_towers.Output:
        assert self.batch.tokens_BT is not None, "the batch has no text"
        with record_function("text tower"):
            return self.model.text(self.batch.tokens_BT)

    @cached_property
    def image_tokens(self) -> Tensor:
        """Patch tokens [N, P, C]."""
        return self._vision.tokens_NPC

    @cached_property
    def image(self) -> Tensor:
        """Unit-norm image features [N, E]: the batch's own where it brings them along, made by a frozen tower."""
        if self.batch.image_NE is not None:
            return self.batch.image_NE
        return F.normalize(self._vision.image_NE.float(), dim=-1)

    @cached_property
    def pooled(self) -> Tensor:
        """What the image tower projects [N, C], or the batch's own."""
        if self.batch.pooled_NC is not None:
            return self.batch.pooled_NC
        return self._vision.pooled_NC.float()

    @cached_property
    def text(self) -> Tensor:
        """Unit-norm text features [B, E]."""
        return F.normalize(self._text.text_BE.float(), dim=-1)

    @property
    def scale(self) -> Tensor:
        """Temperature, [1]."""
        return self.model.scale

    @property
    def sides(self) -> dict[str, Tensor]:
        """Both sides, unit norm [rows, E], and where the batch has them the hashes of captions [rows].

        Raises:
            ConfigError: see `refuse_unpaired`.
        """
        self.refuse_unpaired()
        found = {"image": self.image, "text": self.text}
        return found if self.batch.caption_B is None else {**found, "caption": self.batch.caption_B}

    def refuse_unpaired(self) -> None:
        """Raise a ConfigError where rows have no picture, or several: nobody says which one a text belongs to."""
        if len(self.image) != len(self.batch):
            raise ConfigError(
                f"data: {len(self.image)} pictures in {len(self.batch)} rows, and an objective compares each text with "
                "its picture; take readers that give one a sample, or leave that objective out"
            )

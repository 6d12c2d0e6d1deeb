"""VL-T5 and VL-BART: one text model that reads pictures and answers in words (Cho et al. 2021, arXiv:2102.02779).

The encoder of a T5 or BART reads [text | visual tokens], the decoder writes; every task is a text in and a text out.
A region is named by its sentinel <vis_extra_id_i>, whose row of the word table is also its embedding: id V - 1 - i.

Shapes: B = rows, R = visual tokens of a row, U = tokens of the decoder, C = width, V = vocabulary.
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import base, blocks, convert_vlt5, depth, encoder_decoder, vision, visual_tokens
from pretrain.models.bart import STD, Bart
from pretrain.models.cache import Cache
from pretrain.models.depth import Depth
from pretrain.models.encoder_decoder import EncoderDecoder, initialise
from pretrain.models.t5 import T5
from pretrain.models.visual_embedding import VisualEmbedding
from pretrain.models.visual_tokens import IMAGES, MOST

#: in the order of their ids: the last id is that of region 0
SYMBOLS = tuple(f"<{kind}_{number}>" for kind in ("extra_id", "vis_extra_id") for number in reversed(range(MOST)))


class Config(base.Config):
    """`model:` the text model, its visual tokens and the tokenizer."""

    name: Literal["vlt5"] = "vlt5"
    text: encoder_decoder.Config = Field(default_factory=encoder_decoder.Config)
    vision: visual_tokens.Config = Field(default_factory=visual_tokens.Config)

    @property
    def look(self) -> base.Look:
        """Return how pictures are prepared."""
        return self.vision.look

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Return the most tokens of the source and of what is written."""
        return self.text.source_length, self.text.target_length

    @property
    def pictures(self) -> tuple[int, str] | None:
        """Return the places for pictures; those that a detector has seen before are not looked at again."""
        if self.vision.source == "region":
            return None
        more = "" if self.vision.images == IMAGES else f"set model.vision.images={IMAGES}, or "
        return self.vision.images, f"{more}take a data.reader that gives fewer"

    @property
    def vocabulary_size(self) -> int | None:
        """Return the rows of the word table."""
        return self.text.vocab_size

    @property
    def regions(self) -> tuple[int, int] | None:
        """Return the boxes of a row and the numbers of a box's feature, where a detector gives them."""
        return (self.vision.regions, self.vision.width) if self.vision.source == "region" else None

    def grid(self) -> tuple[int, int] | None:
        """Return the cells of a picture where a tower gives them."""
        return visual_tokens.grid(self.vision) if self.vision.tower else None

    @property
    def from_scratch(self) -> bool:
        """Return whether all weights are drawn."""
        tower = self.vision.tower
        return self.text.weights is None and not (tower and tower.weights)

    @property
    def recomputable(self) -> tuple[str, ...]:
        """Return the overrides that let backward recompute the blocks."""
        return () if self.text.checkpointing else ("model.text.checkpointing=true",)

    def bare(self) -> "Config":
        """Return the model without recomputation and without the file that its text part started from."""
        out = self.model_copy(deep=True)
        out.text.checkpointing, out.text.weights = False, None
        if out.vision.tower:
            out.vision.tower.checkpointing = False
        return out

    def without_files(self, names: Collection[str]) -> "Config":
        """Return the config without the tower's file, where the tower's weights are among these."""
        out = self.model_copy(deep=True)
        if out.vision.tower and vision.among(names, "vision.tower.trunk."):
            out.vision.tower.weights = None
        return out

    @property
    def read_from_files(self) -> tuple[str, ...]:
        """Return where a tower with a file of weights lies."""
        tower = self.vision.tower
        return ("vision.tower.trunk.",) if tower and tower.weights else ()

    def architecture(self) -> dict[str, Any]:
        """Return what a checkpoint belongs to."""
        how = {"dropout", "checkpointing", "weights"}  # how it is trained
        beside = {"text": how, "vision": {"regions": True, "tower": {"checkpointing"}}}
        return self.model_dump(mode="json", exclude={"tokenizer": True, **beside})

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return the sentinels of masked text and of regions, for BART its mask before them.

        Their own tokenizers end with the first ones: T5's with the sentinels of text, BART's with the mask.
        """
        return SYMBOLS if self.text.backbone == "t5" else ("<mask>", *SYMBOLS)

    def opening(self, words: base.Vocabulary) -> tuple[int, ...]:
        """Return T5's padding, whose decoder says at once what it is asked for; or BART's </s> <s>, which says it next.

        Raises:
            ConfigError: BART's tokenizer has no start token.
        """
        if self.text.backbone == "t5":
            return (words.pad,)
        if words.start is None:
            raise ConfigError(
                f"model.text.backbone: BART's decoder starts from </s> <s>, {self.tokenizer} has no start token; "
                "take backbone=t5 or another tokenizer"
            )
        return (words.end, words.start)


class VLT5(base.Writer):
    """A joint encoder, a decoder and the visual embedding between them and the source of visual tokens."""

    provides = ("seq2seq", "generate")

    def __init__(self, config: Config, words: base.Vocabulary) -> None:
        super().__init__()
        self.config = config
        rms = config.text.backbone == "t5"
        self.last = words.size - 1  # the id of region 0
        self.text: EncoderDecoder = T5(config.text) if rms else Bart(config.text)
        self.vision = visual_tokens.build(config.vision)
        self.visual_embedding = VisualEmbedding(
            self.vision.width,
            config.text.width,
            rms=rms,
            norm=config.vision.norm or ("each" if rms else "sum"),
            area_mode=config.vision.area_mode,
        )
        if not rms:
            initialise(self.visual_embedding.modules(), STD)
        self.first, self.end = config.opening(words), words.end
        if config.text.weights:
            convert_vlt5.start_from(self, config.text.weights)
        blocks.recompute(self.text, config.text.checkpointing, key="model.text.checkpointing")

    @classmethod
    def build(cls, config: Config, words: base.Vocabulary) -> "VLT5":
        """Return a freshly initialised model whose vocabulary is the tokenizer's."""
        return cls(base.with_vocabulary(config, words, counted=", sentinels included"), words)

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of the text model and of the tower lies.

        Decoder blocks lie on top of those of the encoder; the word table and the visual embedding are the stem.
        """
        layers = self.config.text.layers
        place = {"encoder": 1, "decoder": 1 + layers}
        out = {f"visual_embedding.{name}": Depth("text", 0, 2 * layers) for name in self._names(self.visual_embedding)}
        for name in self._names(self.text):
            stack, *path = name.split(".")
            numbers = [int(word) for word in path if word.isdigit()]
            norm = layers - 1 if path[0] == "final_layer_norm" else None
            block = numbers[0] if numbers else norm
            out[f"text.{name}"] = Depth("text", 0 if block is None else place[stack] + block, 2 * layers)
        if isinstance(self.vision, visual_tokens.Cells):
            tower = self.vision.tower
            found = depth.of_tower(tower, tower.trunk, "vision")
            out |= {f"vision.tower.{name}": where for name, where in found.items()}
        return out

    @staticmethod
    def _names(module: Any) -> list[str]:
        return [name for name, _ in module.named_parameters()]

    def forward(self, batch: Batch) -> "Encodings":
        """Return the lazily computed memory and logits of a batch."""
        return Encodings(self, batch)

    def remember(self, batch: Batch) -> base.Memory:
        """Return the states of [text | visual tokens]."""
        tokens_BL, valid_BL = batch.tokens_BT, batch.valid_BT
        assert tokens_BL is not None and valid_BL is not None, "the batch has no text to read"
        seen = self.vision(batch, tokens_BL.device)
        region_BRC = self.text.shared(self.last - seen.region_BR)
        visual_BRC = self.visual_embedding(seen.features_BRC, seen.boxes_BR4, seen.image_BR, region_BRC)
        return self.text.encode(tokens_BL, valid_BL, visual_BRC, seen.valid_BR)

    def write(self, tokens_BU: Tensor, memory: base.Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V] of the token after each of these."""
        return self.text.write(tokens_BU, memory, cache)


Model = VLT5


class Encodings:
    """What VL-T5 knows of a batch."""

    def __init__(self, model: VLT5, batch: Batch) -> None:
        self.model, self.batch = model, batch

    @cached_property
    def memory(self) -> base.Memory:
        """What the decoder reads."""
        return self.model.remember(self.batch)

    @cached_property
    def logits_BUV(self) -> Tensor:
        """Logits at each place of the decoder's input [B, U, V]."""
        assert self.batch.decoder_tokens_BU is not None, "the batch has nothing to write"
        return self.model.write(self.batch.decoder_tokens_BU, self.memory)

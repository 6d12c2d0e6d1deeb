"""OFA's section of a config: the five published sizes, or numbers of one's own (Wang et al. 2022, arXiv:2202.03052)."""

from typing import Any, Literal, NamedTuple

from pydantic import Field, StrictBool, model_validator

from pretrain.models import base
from pretrain.models.resnet_stem import BLOCKS, STRIDE, Norm

CODE_PIXELS = 8  #: pixels a side that one image code stands for


class Size(NamedTuple):
    """A published size."""

    width: int
    hidden: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    stem: str


SIZES = {
    "tiny": Size(256, 1024, 4, 4, 4, "resnet50"),
    "medium": Size(512, 2048, 8, 4, 4, "resnet101"),
    "base": Size(768, 3072, 12, 6, 6, "resnet101"),
    "large": Size(1024, 4096, 16, 12, 12, "resnet152"),
    "huge": Size(1280, 5120, 16, 24, 12, "resnet152"),
}
FILES = ("weights", "text_weights", "stem_weights")
TRAINING = {"tokenizer", "checkpointing", "sample_patches", "dropout", "attention_dropout", "drop_path", *FILES}


class Config(base.Config):
    """`model:` one of the published sizes, or numbers of one's own that stand before it."""

    name: Literal["ofa"] = "ofa"
    size: Literal["tiny", "medium", "base", "large", "huge"] = "base"
    width: int | None = Field(default=None, gt=0)
    hidden: int | None = Field(default=None, gt=0)  #: of the feed-forward halves
    heads: int | None = Field(default=None, gt=0)
    encoder_layers: int | None = Field(default=None, gt=0)
    decoder_layers: int | None = Field(default=None, gt=0)
    stem: str | tuple[int, int, int] | None = None  #: resnet50, resnet101, resnet152, or blocks of its three stages
    stem_width: int = Field(default=64, gt=0)
    weights: str | None = None  #: a release of OFA to start from: fairseq's .pt, or the transformers branch's .bin
    text_weights: str | None = None  #: a BART to start the text stack from, its file of weights
    stem_weights: str | None = None  #: a ResNet classifier to start the stem from, torchvision's or timm's names
    batch_norm: Norm = "plain"  #: statistics of each rank's rows, of all ranks' (sync), or never updated (frozen)
    image_size: int = Field(default=384, gt=0)
    code_image_size: int = Field(default=128, gt=0)  #: pixels a side of what image codes show; infilling: the middle
    codes: int = Field(default=8192, gt=0, le=65536)
    bins: int = Field(default=1000, gt=1)
    vocab_size: int | None = Field(default=None, gt=0)  #: of text, codes and bins; None: the tokenizer's
    source_length: int = Field(default=80, gt=1)
    target_length: int = Field(default=264, gt=1)
    positions: int = Field(default=1024, gt=1)  #: places of a text that the tables know
    token_bucket: int = Field(default=256, gt=1)
    image_bucket: int = Field(default=42, gt=0)  #: patches a side that the tables know
    attention_scale: float = Field(default=2.0, gt=0)  #: logits are divided by the root of so many times a head's width
    sample_patches: int | None = Field(default=None, gt=0)  #: patches that training keeps of pictures of image_size
    interpolate_from: int | None = Field(default=None, gt=0)  #: pixels a side whose positions larger pictures stretch
    entangled_encoder: bool = False  #: absolute positions are added to embeddings too, as in the released code's ...
    entangled_decoder: bool = False  #: ... decoder without --disable-entangle
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    drop_path: float = Field(default=0.1, ge=0, lt=1)  #: of the last layer of each stack; the first drops nothing
    checkpointing: StrictBool | int = Field(default=False, ge=0)  #: recompute each layer in backward, or one in so many

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.shape.width % self.shape.heads:
            raise ValueError(f"width {self.shape.width} is not divisible by {self.shape.heads} heads")
        if isinstance(self.shape.stem, str) and self.shape.stem not in BLOCKS:
            raise ValueError(f"stem: no {self.shape.stem!r}; known: {', '.join(BLOCKS)}, or three numbers of blocks")
        for key in ("image_size", "code_image_size", "interpolate_from"):
            pixels, each = getattr(self, key), CODE_PIXELS if key == "code_image_size" else STRIDE
            if pixels is not None and (pixels % each or pixels > each * self.image_bucket):
                raise ValueError(f"{key}: {pixels} is no multiple of {each} up to {each * self.image_bucket}")
        if self.weights and (self.text_weights or self.stem_weights):
            raise ValueError("weights holds the text stack and the stem too; leave text_weights and stem_weights out")
        for key, most in (("source_length", self.positions), ("target_length", self.positions + 2)):
            if getattr(self, key) > most:
                raise ValueError(f"{key}: {getattr(self, key)}, the tables know {most} places; raise model.positions")
        return self

    @property
    def shape(self) -> Size:
        """Return the numbers of the size, with those that are given in their place."""
        given = {key: getattr(self, key) for key in Size._fields if getattr(self, key) is not None}
        return SIZES[self.size]._replace(**given)

    @property
    def look(self) -> base.Look:
        """Return how pictures are prepared."""
        return base.Look(self.image_size, sizes=True)

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Return the most tokens of source and target."""
        return self.source_length, self.target_length

    @property
    def pictures(self) -> tuple[int, str] | None:
        """Return that a row has one picture at most."""
        return 1, "paste them side by side into one"

    @property
    def picture_codes(self) -> int | None:
        """Return the places of the raster that codes are written in."""
        return (self.code_image_size // CODE_PIXELS) ** 2

    @property
    def vocabulary_size(self) -> int | None:
        """Return the ids that the config fixes, codes and bins included."""
        return self.vocab_size

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return the mask, codes and bins: the last ids of the vocabulary (BART's own mask is its last one)."""
        return ("<mask>", *(f"<code_{n}>" for n in range(self.codes)), *(f"<bin_{n}>" for n in range(self.bins)))

    @property
    def from_scratch(self) -> bool:
        """Return whether nothing is read from a file."""
        return not any(getattr(self, key) for key in FILES)

    @property
    def recomputable(self) -> tuple[str, ...]:
        """Return the override that lets backward recompute the layers."""
        return () if self.checkpointing else ("model.checkpointing=true",)

    def bare(self) -> "Config":
        """Return the model without recomputation, sampled patches and the files that training started from."""
        beside = {"checkpointing": False, "sample_patches": None, **dict.fromkeys(FILES)}
        return self.model_copy(update=beside, deep=True)

    def architecture(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        return {**self.model_dump(mode="json", exclude=TRAINING), **self.shape._asdict()}

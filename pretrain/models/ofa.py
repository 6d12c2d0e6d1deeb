"""OFA: one encoder-decoder for pictures, text, boxes and image codes, all of them tokens of one vocabulary.

Wang et al. 2022 (arXiv:2202.03052). The vocabulary is the text's, then `<code_0>` ..., then `<bin_0>` ..., whose ids
follow from its size.

Shapes: B = rows, N = images, T = source tokens, U = decoder tokens, S = states of the memory, C = width,
V = vocabulary.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import base, blocks, convert_ofa
from pretrain.models.cache import Cache
from pretrain.models.depth import Depth
from pretrain.models.encoder_decoder import WordTable
from pretrain.models.ofa_config import CODE_PIXELS, Config
from pretrain.models.ofa_decoder import Decoder
from pretrain.models.ofa_encoder import Encoded, Encoder, Pictures
from pretrain.models.ofa_layers import Shape
from pretrain.models.ofa_positions import Positions
from pretrain.models.resnet_stem import BLOCKS, STRIDE, ResNetStem
from pretrain.models.vision import Normalise

__all__ = ["OFA", "Config", "Encodings", "Model"]


class OFA(base.Writer):
    """Encoder, decoder, and the words that both share."""

    provides = ("seq2seq", "generate")

    def __init__(self, config: Config, words: base.Vocabulary) -> None:
        super().__init__()
        self.config, self.first, self.end = config, config.opening(words), words.end
        size = config.shape
        shape = Shape(
            size.width, size.hidden, size.heads, config.attention_scale, config.dropout, config.attention_dropout
        )
        self.normalise = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.embed_tokens = WordTable(words.size, size.width, padding_idx=words.pad)
        stem = ResNetStem(
            BLOCKS[size.stem] if isinstance(size.stem, str) else size.stem,
            norm=config.batch_norm,
            width=config.stem_width,
        )
        self.encoder = Encoder(
            shape, self._positions(size.encoder_layers), stem, _rising(config.drop_path, size.encoder_layers)
        )
        self.decoder = Decoder(
            shape,
            self._positions(size.decoder_layers),
            _rising(config.drop_path, size.decoder_layers),
            window=config.code_image_size // CODE_PIXELS,
        )
        self._initialise()
        self._start_from_files()
        for stack in (self.encoder, self.decoder):
            blocks.recompute(nn.ModuleDict({"layers": stack.layers}), config.checkpointing, key="model.checkpointing")

    @classmethod
    def build(cls, config: Config, words: base.Vocabulary) -> "OFA":
        """Return a freshly initialised model.

        Raises:
            ConfigError: the vocabulary is larger than the config says, or has no room for codes and bins.
        """
        if config.vocab_size is not None and config.vocab_size < words.size:
            raise ConfigError(
                f"model.vocab_size: {config.vocab_size} is too small, the tokenizer with codes and bins has "
                f"{words.size} ids; leave it out to take the tokenizer's"
            )
        if words.size <= config.codes + config.bins:
            raise ConfigError(
                f"model.codes: {words.size} ids have no room beside {config.codes} codes and {config.bins} bins"
            )
        words = words._replace(size=config.vocab_size or words.size)
        return cls(config.model_copy(deep=True), words)

    def _positions(self, layers: int) -> Positions:
        c = self.config
        return Positions(
            width=c.shape.width,
            heads=c.shape.heads,
            layers=layers,
            longest=c.positions,
            bucket=c.token_bucket,
            side=c.image_bucket,
        )

    def _initialise(self) -> None:
        """Draw linears and embeddings from N(0, 0.02); relative tables start at zero."""
        for name, part in self.named_modules():
            if isinstance(part, nn.Embedding) and "rel_pos_table" in name:
                nn.init.zeros_(part.weight)
            elif isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
        with torch.no_grad():
            self.embed_tokens.weight[self.embed_tokens.padding_idx] = 0

    def _start_from_files(self) -> None:
        c = self.config
        if c.weights:
            state = convert_ofa.to_ours(convert_ofa.read(c.weights, key="model.weights"))
            try:
                self.load_state_dict(state)
            except RuntimeError as error:
                raise ConfigError(f"model.weights: {c.weights} does not fit the model ({str(error)[:400]})") from None
        if c.text_weights:
            bart = convert_ofa.read(c.text_weights, key="model.text_weights")
            self.load_state_dict(convert_ofa.from_bart(bart, self.state_dict()), strict=False)
        if c.stem_weights:
            self.encoder.embed_images.fill(convert_ofa.read(c.stem_weights, key="model.stem_weights"))

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter lies: embeddings, stem and absolute positions are layer 0 of their stack."""
        out = {}
        for tower, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            last = len(stack.layers)
            for name, _ in stack.named_parameters():
                words = name.split(".")
                inside = words[0] == "layers" or "_rel_pos_table_list" in name
                number = next((int(word) for word in words if word.isdigit()), 0)
                layer = number + 1 if inside else last if words[0] == "layer_norm" else 0
                out[f"{tower}.{name}"] = Depth(tower, layer, last)
        return out

    def forward(self, batch: Batch) -> "Encodings":
        """Return the lazily computed logits of a batch."""
        return Encodings(self, batch)

    def encode(self, batch: Batch) -> Encoded:
        """Return what the decoder reads of a batch."""
        assert batch.tokens_BT is not None and batch.valid_BT is not None, "the batch has no source text"
        c = self.config
        pictures = self._pictures(batch)
        sampled = self.training and pictures.image_NCHW.shape[-1] == c.image_size
        return self.encoder(
            self.embed_tokens(batch.tokens_BT),
            batch.valid_BT,
            pictures,
            draw_B=batch.draw_B,
            keep=c.sample_patches if sampled else None,
            known=None if c.interpolate_from is None else c.interpolate_from // STRIDE,
            entangled=c.entangled_encoder,
        )

    def _pictures(self, batch: Batch) -> Pictures:
        """Return the normalised pictures of a batch; ZeRO-3 compares which modules a rank calls, so there is one."""
        assert batch.valid_BT is not None
        rows, device = len(batch), batch.valid_BT.device
        seen_B = torch.zeros(rows, dtype=torch.bool, device=device)
        image_NCHW, owner_N, found = batch.image_NCHW, batch.owner_N, batch.image_NCHW is not None
        if image_NCHW is None:
            image_NCHW = torch.zeros(1, 3, STRIDE, STRIDE, dtype=torch.uint8, device=device)
            owner_N = torch.zeros(1, dtype=torch.long, device=device)
        if len(image_NCHW) > rows:
            raise ConfigError(
                f"data.reader: gives {len(image_NCHW)} pictures for {rows} rows, OFA reads one a row; paste them "
                "side by side into one"
            )
        owner_N = torch.arange(rows, device=device) if owner_N is None else owner_N
        image_NCHW = self.normalise(image_NCHW).to(self.encoder.image_proj.weight.dtype)
        if batch.hole_N is not None:
            image_NCHW = hide_middle(image_NCHW, batch.hole_N)
        image_NCHW = image_NCHW.contiguous(memory_format=torch.channels_last)
        return Pictures(image_NCHW, owner_N, seen_B.index_fill(0, owner_N, value=True) if found else seen_B, found)

    def remember(self, batch: Batch) -> base.Memory:
        """Return what the decoder reads of a batch, and what it writes of each row: text or codes."""
        found = self.encode(batch)
        beside = {
            "positions": found.positions_BSC.expand(len(batch), -1, -1),
            "codes": codes_of(batch, found.valid_BS.device),
        }
        return base.Memory(found.states_BSC, found.valid_BS, beside)

    def write(self, tokens_BU: Tensor, memory: base.Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V] of the token after each of these, which follow those that the cache holds."""
        read = Encoded(memory.states_BSC, memory.valid_BS, memory.beside["positions"])
        return self.decode(tokens_BU, read, memory.beside["codes"], cache)

    def decode(self, tokens_BU: Tensor, read: Encoded, codes_B: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V]."""
        words_BUC = self.embed_tokens(tokens_BU)
        states_BUC = self.decoder(words_BUC, read, codes_B, cache, entangled=self.config.entangled_decoder)
        return self.embed_tokens(states_BUC)


Model = OFA


class Encodings:
    """What the model knows of a batch, computed when first asked for."""

    def __init__(self, model: OFA, batch: Batch) -> None:
        self.model, self.batch = model, batch

    @cached_property
    def encoded(self) -> Encoded:
        """States of pictures and source text."""
        return self.model.encode(self.batch)

    @cached_property
    def logits_BUV(self) -> Tensor:
        """Logits [B, U, V] at each place of the batch's decoder tokens."""
        assert self.batch.decoder_tokens_BU is not None, "the batch has no target text"
        read = self.encoded
        return self.model.decode(self.batch.decoder_tokens_BU, read, codes_of(self.batch, read.valid_BS.device))


def codes_of(batch: Batch, device: torch.device) -> Tensor:
    """Return bool [B]: which rows write image codes."""
    if batch.codes_B is not None:
        return batch.codes_B
    return torch.zeros(len(batch), dtype=torch.bool, device=device)


def hide_middle(image_NCHW: Tensor, hole_N: Tensor) -> Tensor:
    """Return normalised pictures with the middle half of each side set to zero in some of them."""
    height, width = image_NCHW.shape[-2:]
    middle_HW = torch.zeros(height, width, dtype=torch.bool, device=image_NCHW.device)
    middle_HW[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return image_NCHW.masked_fill(hole_N[:, None, None, None] & middle_HW, 0.0)


def _rising(rate: float, layers: int) -> list[float]:
    """Return the drop-path rate of each layer: linear from 0 to `rate`."""
    return [rate * number / max(1, layers - 1) for number in range(layers)]

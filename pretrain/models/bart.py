"""BART's encoder-decoder (Lewis et al. 2020, arXiv:1910.13461) with a joint encoder for visual tokens (VL-BART).

Names of weights are those of transformers' BartForConditionalGeneration, without the leading "model.". Visual tokens
are put behind the text after its positions and its norm: they get neither (Cho et al. 2021, arXiv:2102.02779).

Shapes: B = rows, L = source tokens, N = visual tokens, T = L + N, U = tokens of the decoder, K = keys, S = states of
the memory, C = width, H = heads, D = width of a head, V = vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.base import Memory
from pretrain.models.cache import Cache
from pretrain.models.encoder_decoder import Config, EncoderDecoder, WordTable, dropped, heads, initialise

OFFSET = 2  #: the first rows of the tables of positions are never read, a leftover of fairseq's padding
STD = 0.02


class Attention(nn.Module):
    """Scaled dot-product attention with biases."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.count, self.p = config.heads, config.dropout
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(
        self, x_BTC: Tensor, mask: Tensor | None, memory_BSC: Tensor | None, cache: Cache | None, name: str
    ) -> Tensor:
        """Return [B, T, C]; keys come from the memory where there is one. `mask` is True where a key is seen."""
        q_BHTD = heads(self.q_proj(x_BTC), self.count)
        kept = cache.once(name) if cache is not None and memory_BSC is not None else None
        if kept is None:
            source = x_BTC if memory_BSC is None else memory_BSC
            kept = heads(self.k_proj(source), self.count), heads(self.v_proj(source), self.count)
            if cache is not None:
                kept = (cache.grow if memory_BSC is None else cache.keep)(name, *kept)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, *kept, attn_mask=mask, dropout_p=dropped(self.p, self))
        return self.out_proj(y_BHTD.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Post-norm block: self-attention, in a decoder attention to the memory, and the feed-forward half."""

    def __init__(self, config: Config, number: int, *, decoder: bool) -> None:
        super().__init__()
        self.number, self.p = number, config.dropout
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        if decoder:
            self.encoder_attn = Attention(config)
            self.encoder_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(
        self, x_BTC: Tensor, mask: Tensor | None, memory: Memory | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return [B, T, C]."""
        y_BTC = self.self_attn(x_BTC, mask, None, cache, f"self {self.number}")
        x_BTC = self.self_attn_layer_norm(x_BTC + self._drop(y_BTC))
        if memory is not None:
            seen_B11S = memory.valid_BS[:, None, None]
            y_BTC = self.encoder_attn(x_BTC, seen_B11S, memory.states_BSC, cache, f"memory {self.number}")
            x_BTC = self.encoder_attn_layer_norm(x_BTC + self._drop(y_BTC))
        y_BTC = self.fc2(self._drop(F.gelu(self.fc1(x_BTC))))
        return self.final_layer_norm(x_BTC + self._drop(y_BTC))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Stack(nn.Module):
    """The table of positions, the norm of the embedded text and the blocks, of the encoder or of the decoder."""

    def __init__(self, config: Config, *, decoder: bool) -> None:
        super().__init__()
        self.p = config.dropout
        self.embed_positions = nn.Embedding(config.positions + OFFSET, config.width)
        self.layers = nn.ModuleList(Layer(config, number, decoder=decoder) for number in range(config.layers))
        self.layernorm_embedding = nn.LayerNorm(config.width)

    def embed(self, x_BTC: Tensor, *, past: int = 0) -> Tensor:
        """Return text with its positions, of which the first is `past`."""
        place_T = torch.arange(past, past + x_BTC.shape[1], device=x_BTC.device)
        return self.layernorm_embedding(x_BTC + self.embed_positions(place_T + OFFSET))

    def forward(
        self, x_BTC: Tensor, mask: Tensor | None, memory: Memory | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return states [B, T, C]."""
        x_BTC = F.dropout(x_BTC, self.p, self.training)
        for layer in self.layers:
            x_BTC = layer(x_BTC, mask, memory, cache)
        return x_BTC


class Bart(EncoderDecoder):
    """BART: shared table, learned positions, norms after each residual sum, GELU, and a bias of the logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.vocab_size, "the model fills vocab_size from the tokenizer"
        self.shared = WordTable(config.vocab_size, config.width)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        initialise(self.modules(), STD)

    def encode(
        self, tokens_BL: Tensor, valid_BL: Tensor, visual_BNC: Tensor | None = None, valid_BN: Tensor | None = None
    ) -> Memory:
        """Return the states of [text | vision]."""
        x_BTC, valid_BT = self.encoder.embed(self.shared(tokens_BL)), valid_BL
        if visual_BNC is not None:
            assert valid_BN is not None, "visual tokens come with their mask"
            x_BTC, valid_BT = torch.cat([x_BTC, visual_BNC.to(x_BTC)], 1), torch.cat([valid_BL, valid_BN], 1)
        return Memory(self.encoder(x_BTC, valid_BT[:, None, None]), valid_BT)

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V]."""
        past, length = 0 if cache is None else cache.length, tokens_BU.shape[1]
        seen_UK = torch.ones(length, past + length, dtype=torch.bool, device=tokens_BU.device).tril(past)
        x_BUC = self.decoder.embed(self.shared(tokens_BU), past=past)
        return self.shared(self.decoder(x_BUC, seen_UK, memory, cache)) + self.final_logits_bias

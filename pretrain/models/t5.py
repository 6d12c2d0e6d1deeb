"""T5's encoder-decoder (Raffel et al. 2020, arXiv:1910.10683) with a joint encoder for visual tokens (VL-T5).

Names of weights are those of transformers' T5ForConditionalGeneration. The encoder is our own, since transformers gives
the whole sequence text-like relative positions: in VL-T5 (Cho et al. 2021, arXiv:2102.02779, section 3) no pair that
touches a visual token has a bias.

Shapes: B = rows, L = source tokens, N = visual tokens, T = L + N, U = tokens of the decoder, K = keys, S = states of
the memory, C = width, H = heads, D = width of a head, V = vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.base import Memory
from pretrain.models.cache import Cache
from pretrain.models.encoder_decoder import Config, EncoderDecoder, WordTable, dropped, heads

BUCKETS, FARTHEST = 32, 128  #: of relative positions; beyond the farthest all are one
EPS = 1e-6


def bucket(relative: Tensor, *, bidirectional: bool) -> Tensor:
    """Return the bucket of each relative position, key minus query: exact ones near, logarithmic ones far.

    Without `bidirectional` what lies ahead is in bucket 0. Source: Raffel et al. 2020, section 2.1, and their code.
    """
    count, offset = BUCKETS, torch.zeros_like(relative)
    if bidirectional:
        count //= 2
        offset = (relative > 0).long() * count
        relative = relative.abs()
    else:
        relative = (-relative).clamp(min=0)
    exact = count // 2
    far = torch.log(relative.clamp(min=1).float() / exact) / math.log(FARTHEST / exact) * (count - exact)
    far = (exact + far.long()).clamp(max=count - 1)
    return offset + torch.where(relative < exact, relative, far)


class Attention(nn.Module):
    """Attention without the scale 1 / sqrt(D), which T5's initialisation absorbs; the first layer owns the bias."""

    def __init__(self, config: Config, *, biased: bool = False) -> None:
        super().__init__()
        self.count, self.p = config.heads, config.dropout
        inner = config.heads * (config.head_width or config.width // config.heads)
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(BUCKETS, config.heads)
            nn.init.normal_(self.relative_attention_bias.weight, std=config.width**-0.5)
        nn.init.normal_(self.q.weight, std=(config.width * inner / config.heads) ** -0.5)
        for linear in (self.k, self.v):
            nn.init.normal_(linear.weight, std=config.width**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def bias(self, queries: int, keys: int, *, bidirectional: bool) -> Tensor:
        """Return the bias [1, H, queries, keys]; the last query stands where the last key does."""
        device = self.relative_attention_bias.weight.device
        key_K = torch.arange(keys, device=device)
        bucket_UK = bucket(key_K - key_K[keys - queries :, None], bidirectional=bidirectional)
        return self.relative_attention_bias(bucket_UK).permute(2, 0, 1)[None]

    def forward(self, x_BTC: Tensor, mask: Tensor, memory_BSC: Tensor | None, cache: Cache | None, name: str) -> Tensor:
        """Return [B, T, C]; keys come from the memory where there is one. `mask` is a bias, or bool (True: seen)."""
        q_BHTD = heads(self.q(x_BTC), self.count)
        kept = cache.once(name) if cache is not None and memory_BSC is not None else None
        if kept is None:
            source = x_BTC if memory_BSC is None else memory_BSC
            kept = heads(self.k(source), self.count), heads(self.v(source), self.count)
            if cache is not None:
                kept = (cache.grow if memory_BSC is None else cache.keep)(name, *kept)
        mask = mask if mask.dtype == torch.bool else mask.to(q_BHTD.dtype)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, *kept, attn_mask=mask, dropout_p=dropped(self.p, self), scale=1.0
        )
        return self.o(y_BHTD.transpose(1, 2).flatten(2))


class Norm(nn.RMSNorm):
    """RMS norm in the precision of its gain: autocast does so for LayerNorm, and leaves this one to its input's."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normed."""
        return super().forward(x.to(self.weight.dtype))


class FeedForward(nn.Module):
    """Two linears around a ReLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.p = config.dropout
        self.wi = nn.Linear(config.width, config.hidden, bias=False)
        self.wo = nn.Linear(config.hidden, config.width, bias=False)
        nn.init.normal_(self.wi.weight, std=config.width**-0.5)
        nn.init.normal_(self.wo.weight, std=config.hidden**-0.5)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return [B, T, C]."""
        return self.wo(F.dropout(F.relu(self.wi(x_BTC)), self.p, self.training))


class Layer(nn.Module):
    """A pre-norm residual half of a block, under the name that transformers gives its inner module."""

    def __init__(self, config: Config, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.name, self.p = name, config.dropout
        self.add_module(name, inner)
        self.layer_norm = Norm(config.width)

    @property
    def inner(self) -> nn.Module:
        """The module between norm and residual sum."""
        return self.get_submodule(self.name)

    def forward(self, x_BTC: Tensor, *rest: object) -> Tensor:
        """Return [B, T, C]; `rest` goes to the inner module."""
        return x_BTC + F.dropout(self.inner(self.layer_norm(x_BTC), *rest), self.p, self.training)


class Block(nn.Module):
    """Self-attention, in a decoder attention to the memory, and the feed-forward half."""

    def __init__(self, config: Config, number: int, *, decoder: bool) -> None:
        super().__init__()
        self.number = number
        parts = [Layer(config, "SelfAttention", Attention(config, biased=number == 0))]
        if decoder:
            parts.append(Layer(config, "EncDecAttention", Attention(config)))
        self.layer = nn.ModuleList([*parts, Layer(config, "DenseReluDense", FeedForward(config))])

    def forward(self, x_BTC: Tensor, mask: Tensor, memory: Memory | None = None, cache: Cache | None = None) -> Tensor:
        """Return [B, T, C]."""
        x_BTC = self.layer[0](x_BTC, mask, None, cache, f"self {self.number}")
        if memory is not None:
            seen_B11S = memory.valid_BS[:, None, None]
            x_BTC = self.layer[1](x_BTC, seen_B11S, memory.states_BSC, cache, f"memory {self.number}")
        return self.layer[-1](x_BTC)


class Stack(nn.Module):
    """The blocks of the encoder or of the decoder, and the norm after them."""

    def __init__(self, config: Config, *, decoder: bool) -> None:
        super().__init__()
        self.p = config.dropout
        self.block = nn.ModuleList(Block(config, number, decoder=decoder) for number in range(config.layers))
        self.final_layer_norm = Norm(config.width)

    def bias(self, queries: int, keys: int, *, bidirectional: bool) -> Tensor:
        """Return the relative bias [1, H, queries, keys] that all layers add."""
        # a method may have put a module of its own around the attention, see sites.py
        owner = next(part for part in self.block[0].modules() if isinstance(part, Attention))
        return owner.bias(queries, keys, bidirectional=bidirectional)

    def joint_bias(self, text: int, visual: int) -> Tensor:
        """Return the bias [1, H, T, T] of `text` tokens and then `visual` ones: 0 where a pair touches vision."""
        return F.pad(self.bias(text, text, bidirectional=True), (0, visual, 0, visual))

    def forward(self, x_BTC: Tensor, mask: Tensor, memory: Memory | None = None, cache: Cache | None = None) -> Tensor:
        """Return states [B, T, C] under an additive mask."""
        x_BTC = F.dropout(x_BTC, self.p, self.training)
        for block in self.block:
            x_BTC = block(x_BTC, mask, memory, cache)
        return F.dropout(self.final_layer_norm(x_BTC), self.p, self.training)


class T5(EncoderDecoder):
    """T5 v1.0: shared table, RMS norms before each half, ReLU, no biases."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.vocab_size, "the model fills vocab_size from the tokenizer"
        self.width = config.width
        self.shared = WordTable(config.vocab_size, config.width)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        nn.init.normal_(self.shared.weight)

    def encode(
        self, tokens_BL: Tensor, valid_BL: Tensor, visual_BNC: Tensor | None = None, valid_BN: Tensor | None = None
    ) -> Memory:
        """Return the states of [text | vision]."""
        x_BTC, valid_BT, visual = self.shared(tokens_BL), valid_BL, 0
        if visual_BNC is not None:
            assert valid_BN is not None, "visual tokens come with their mask"
            visual = visual_BNC.shape[1]
            x_BTC, valid_BT = torch.cat([x_BTC, visual_BNC.to(x_BTC)], 1), torch.cat([valid_BL, valid_BN], 1)
        bias_1HTT = self.encoder.joint_bias(tokens_BL.shape[1], visual)
        mask_BHTT = bias_1HTT.masked_fill(~valid_BT[:, None, None], float("-inf"))
        return Memory(self.encoder(x_BTC, mask_BHTT), valid_BT)

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V]; states are divided by sqrt(C) before the table turns them into logits."""
        length = tokens_BU.shape[1]
        keys = length + (0 if cache is None else cache.length)
        bias_1HUK = self.decoder.bias(length, keys, bidirectional=False)
        ahead_UK = torch.ones(length, keys, dtype=torch.bool, device=bias_1HUK.device).triu(keys - length + 1)
        mask_1HUK = bias_1HUK.masked_fill(ahead_UK, float("-inf"))
        states_BUC = self.decoder(self.shared(tokens_BU), mask_1HUK, memory, cache)
        return self.shared(states_BUC * self.width**-0.5)

"""Small real decoders that write: one with a cache of its own, and transformers' models behind the same protocol."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import dist
from pretrain.batch import Batch
from pretrain.models import base
from pretrain.models.base import Memory
from pretrain.models.cache import Cache

WORDS = 11  # ids; the last is the end token, the one before it starts
END, START = WORDS - 1, WORDS - 2


class Layer(nn.Module):
    """Self-attention over what is written, then attention to the memory, then a linear layer."""

    def __init__(self, name: str, width: int, heads: int) -> None:
        super().__init__()
        self.name, self.heads = name, heads
        self.own, self.own_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.other, self.other_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BUC: Tensor, memory: Memory, cache: Cache | None) -> Tensor:
        key, value = (self._heads(part) for part in self.own_kv(x_BUC).chunk(2, 2))
        if cache is not None:
            key, value = cache.grow(self.name, key, value)
        before = key.shape[2] - x_BUC.shape[1]
        see_UT = torch.arange(key.shape[2]) <= before + torch.arange(x_BUC.shape[1])[:, None]
        x_BUC = x_BUC + self._merge(
            F.scaled_dot_product_attention(self._heads(self.own(x_BUC)), key, value, attn_mask=see_UT)
        )
        found = None if cache is None else cache.once(self.name)
        if found is None:
            found = tuple(self._heads(part) for part in self.other_kv(memory.states_BSC).chunk(2, 2))
            if cache is not None:
                cache.keep(self.name, *found)
        see_B11S = memory.valid_BS[:, None, None]
        y = F.scaled_dot_product_attention(self._heads(self.other(x_BUC)), *found, attn_mask=see_B11S)
        x_BUC = x_BUC + self._merge(y)
        return x_BUC + torch.tanh(self.out(x_BUC))

    def _heads(self, x_BUC: Tensor) -> Tensor:
        return x_BUC.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _merge(self, x_BHUD: Tensor) -> Tensor:
        return x_BHUD.transpose(1, 2).flatten(2)


class TinyWriter(base.Writer):
    """Two layers; the memory is the picture's mean colours and the given tokens."""

    provides = ("generate",)
    first, end = (START,), END

    def __init__(self, *, words: int = WORDS, first: int = START, end: int = END, seed: int = 0, sharp: float = 0.25):
        super().__init__()
        dist.seed_step(seed, "writer")
        self.words = nn.Embedding(words, 16)
        self.places = nn.Embedding(128, 16)
        self.head = nn.Linear(16, words, bias=False)
        self.head.weight = self.words.weight  # called as a module: ZeRO-3 gathers a tied weight there as well
        self.picture = nn.Linear(3, 16)
        self.layers = nn.ModuleList(Layer(str(n), 16, 2) for n in range(2))
        self.first, self.end, self.sharp = (first,), end, sharp
        self.calls = 0
        self.double()

    def remember(self, batch: Batch) -> Memory:
        given_BTC = self.words(batch.tokens_BT)
        valid_BT = torch.ones_like(batch.tokens_BT, dtype=torch.bool) if batch.valid_BT is None else batch.valid_BT
        colour_B1C = given_BTC.new_zeros(len(given_BTC), 1, 16)
        if batch.image_NCHW is not None:
            colour_B1C = self.picture(batch.image_NCHW.to(given_BTC).mean((2, 3)) / 128)[:, None]
        valid_BS = torch.cat([torch.ones_like(valid_BT[:, :1]), valid_BT], 1)
        return Memory(torch.cat([colour_B1C, given_BTC], 1), valid_BS)

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        self.calls += 1
        before = 0 if cache is None else cache.length
        x_BUC = self.words(tokens_BU) + self.places(before + torch.arange(tokens_BU.shape[1]))
        for layer in self.layers:
            x_BUC = layer(x_BUC, memory, cache)
        return self.head(self.sharp * x_BUC)


class Theirs(base.Writer):
    """An encoder-decoder of transformers, or a decoder alone, which reads no memory; nothing is cached."""

    provides = ("generate",)

    def __init__(self, model: nn.Module, *, first: tuple[int, ...], end: int) -> None:
        super().__init__()
        self.model, self.first, self.end = model, first, end

    def remember(self, batch: Batch) -> Memory:
        if not self.model.config.is_encoder_decoder:
            return Memory(torch.zeros(len(batch), 1, 1), torch.ones(len(batch), 1, dtype=torch.bool))
        encoder = self.model.get_encoder()
        states = encoder(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long()).last_hidden_state
        return Memory(states, batch.valid_BT)

    def write(self, tokens_BU: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        assert cache is None
        if not self.model.config.is_encoder_decoder:
            return self.model(input_ids=tokens_BU, use_cache=False).logits
        return self.model(
            encoder_outputs=(memory.states_BSC,), attention_mask=memory.valid_BS.long(), decoder_input_ids=tokens_BU,
            use_cache=False,
        ).logits  # fmt: skip


def given(rows: int = 4, *, length: int = 5, words: int = WORDS, seed: int = 0) -> Batch:
    """Return random texts that are given, the last rows shorter, with draws."""
    source = torch.Generator().manual_seed(seed)
    valid_BT = torch.ones(rows, length, dtype=torch.bool)
    valid_BT[rows // 2 :, -2:] = False
    return Batch(
        keys=[f"{seed}-{row}" for row in range(rows)],
        tokens_BT=torch.randint(2, words - 2, (rows, length), generator=source),
        valid_BT=valid_BT,
        draw_B=torch.arange(rows) + 100 * seed,
    )


def write_unequally(stage: int) -> list:
    """Run on every rank: each writes rows and prompts of its own inside the forward that DeepSpeed wraps.

    Returns what was written, the calls of the decoder, and the calls that the rank would have made alone.
    """
    from pretrain.engine import optim, zero
    from pretrain.models.candidates import rank
    from pretrain.models.generate import generate
    from pretrain.models.writing import Options
    from pretrain.objectives.base import Mixture

    batch = given(3, seed=dist.rank())
    prompts = [[5] * n for n in ((0, 0, 0), (1, 2, 9))[dist.rank() % 2]]
    ways = (Options(max_tokens=9, no_repeat=1), Options(beams=3, max_tokens=6), Options(sample=True, max_tokens=8))

    def want(model: TinyWriter, batch: Batch) -> list:
        found = [generate(model, batch, options, prompts=prompts) for options in ways]
        return [*found, rank(model, model.remember(batch), [[2, 3], [4], [5, 5, 5]], prompts=prompts, chunk=2)]

    with torch.no_grad():
        plain, group = TinyWriter().float(), dist.active
        dist.active = lambda: False  # alone
        try:
            expected = want(plain, batch)
        finally:
            dist.active = group
    mixture = Mixture(TinyWriter().float(), {})
    mixture.model.places = Places(mixture.model.places)
    engine = zero.Engine(
        mixture, zero.Config(stage=stage), optim_config=optim.Config(), precision="fp32", rows=3,
        device=torch.device("cpu"),
    )  # fmt: skip
    with engine.evaluating() as module:
        found = module([batch], want=want)
    for one, other in zip(found[:3], expected[:3]):
        assert [[h.tokens for h in row] for row in one] == [[h.tokens for h in row] for row in other]
    torch.testing.assert_close(found[3], expected[3])
    return [mixture.model.calls, plain.calls, mixture.model.places.highest]


class Places(nn.Module):
    """An embedding of places that remembers the highest one it was asked for."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.highest = table, 0

    def forward(self, place_U: Tensor) -> Tensor:
        self.highest = max(self.highest, int(place_U.max()))
        return self.table(place_U)

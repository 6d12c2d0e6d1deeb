"""Two towers and the layers that fuse them: text that reads pictures, under any mask, and writes about them.

`model.fusion` makes a model of two towers (vlm.py) one of these. A text goes up the text tower and the fusion under one
and the same mask: a causal text whose lower layers had read it both ways would know what it is to say. The text feature
that rows are compared by is still that of causal text, pooled at its end token: the two-tower half is CLIP. Words are
scored by their own embeddings. A re-implementation of the idea of Liu et al. 2021 (UniVL, arXiv:2112.05587), of which
no code was published; masks as in models/masks.py.

Shapes: B = rows, T = tokens, U = tokens written, G = given tokens (a prompt), N = images, M = images a row reads,
R = their tokens, C = width, V = vocabulary.
"""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import base, depth, fusion, vlm
from pretrain.models import vision as vision_towers
from pretrain.models.attention import Sight
from pretrain.models.cache import Cache
from pretrain.models.depth import Depth
from pretrain.models.fusion import Stream

IGNORE = -100


class FusedVLM(vlm.VLM, base.Writer):
    """Two towers, a temperature, and text that reads pictures."""

    provides = ("image", "text", "fuse", "cloze", "match", "generate")
    prompt_block = 0  #: a prompt is read both ways

    def __init__(self, config: vlm.Config, words: base.Vocabulary) -> None:
        assert config.fusion is not None
        super().__init__(config, end=words.end, pad=words.pad)
        self.words = words
        if words.start is None:
            raise ConfigError(
                f"model.tokenizer: {config.tokenizer} names no start token, which what is written follows"
            )
        self.first, self.end = (words.start,), words.end
        text = config.text
        self.bridge = fusion.Bridge(self.vision.width, text.width)
        self.fusion = fusion.build(
            config.fusion, width=text.width, heads=text.heads, mlp_ratio=text.mlp_ratio, activation=text.activation
        )
        self.match = nn.Linear(text.width, 2) if "match" in self.provides else None
        if self.match is not None:
            nn.init.normal_(self.match.weight, std=text.width**-0.5)

    @classmethod
    def build(cls, config: vlm.Config, words: base.Vocabulary) -> "FusedVLM":
        """Return a freshly initialised model whose vocabulary is the tokenizer's."""
        if "cloze" in cls.provides and words.mask is None:
            raise ConfigError(
                f"model.tokenizer: {config.tokenizer} has no mask token, which model.fusion hides words by"
            )
        return cls(base.with_vocabulary(config, words), words)

    def depths(self) -> dict[str, Depth]:
        """Return where each parameter of a tower lies, by name; the fusion is a tower of its own."""
        of_fusion = depth.of_tower(self.fusion, self.fusion, "fusion")
        return super().depths() | {f"fusion.{name}": found for name, found in of_fusion.items()}

    def forward(self, batch: Batch) -> "FusedEncodings":
        """Return the lazily computed features of a batch."""
        return FusedEncodings(self, batch)

    # what follows is called inside forward: each part is a module of its own, whose weights ZeRO-3 gathers when called

    def states(
        self,
        tokens_BT: Tensor,
        stream: Stream,
        sight: Sight,
        *,
        cache: Cache | None = None,
        text_B: Tensor | None = None,
    ) -> Tensor:
        """Return fused states [B, T, C] of tokens, which are the last of the stream.

        `text_B`: rows of tokens and stream are read by many rows of the sight: which one each of these reads.
        """
        length = tokens_BT.shape[1]
        places_BT = None
        if cache is not None:  # a prompt is padded on its right, what is written comes after it
            assert stream.valid_BS is not None
            places_BT = (stream.valid_BS.long().cumsum(1) - 1)[:, -length:]
            # a row that is done goes on with its batch, of which others have shorter prompts: what it says is not read
            places_BT = places_BT.clamp(0, self.config.text.context_length - 1)
        with record_function("text tower"):
            text_BTC = self.text(tokens_BT, mask_B1TS=stream.mask(length), places_BT=places_BT, cache=cache).tokens_BTC
        return self.fused(text_BTC, stream, sight, cache=cache, text_B=text_B)

    def fused(
        self,
        text_BTC: Tensor,
        stream: Stream,
        sight: Sight,
        *,
        cache: Cache | None = None,
        text_B: Tensor | None = None,
    ) -> Tensor:
        """Return fused states [B, T, C] of text states; see `states`."""
        if text_B is not None:
            text_BTC = text_BTC[text_B]
            stream = Stream(*(None if part is None else part[text_B] for part in stream))
        with record_function("fusion"):
            return self.fusion(text_BTC, stream, sight, cache)

    def lm_logits(self, states_BTC: Tensor) -> Tensor:
        """Return the score of each word [B, T, V]."""
        return self.text.token_embedding(states_BTC, score=True)

    def match_logits(self, states_BTC: Tensor) -> Tensor:
        """Return scores [B, 2] that text and picture belong together (the second) or not, from a text read both ways.

        The first token's state says it: under a causal mask it would know nothing of the text.
        """
        assert self.match is not None
        return self.match(states_BTC[:, 0])

    # --- writing ---

    def remember(self, batch: Batch) -> base.Memory:
        """Return pictures and prompt of each row; the prompt is what comes before the first word that is learned."""
        assert batch.tokens_BT is not None and batch.labels_BT is not None and batch.valid_BT is not None
        sight = self(batch).sight()
        given_BT = batch.valid_BT & (batch.labels_BT == IGNORE)
        longest = int(given_BT.sum(1).max())
        beside = {"prompt_BG": batch.tokens_BT[:, :longest], "given_BG": given_BT[:, :longest]}
        return base.Memory(sight.of_rows(), sight.valid_BR, beside)

    def write(self, tokens_BU: Tensor, memory: base.Memory, cache: Cache | None = None) -> Tensor:
        """Return logits [B, U, V] of the token after each of these.

        The first token that is ever written, `first`, stands for the whole prompt, which begins with it: what is said
        of it is what follows the prompt. With a cache the tokens follow those that it holds.
        """
        assert self.config.fusion is not None
        if self.config.fusion.predict == "next":
            # without a cache to go on with, one is made: it also keeps the places of padded prompts in order
            return self.lm_logits(self._next(tokens_BU, memory, Cache() if cache is None else cache))
        cache = Cache() if cache is None else cache
        mask_B1 = torch.full_like(tokens_BU[:, :1], self.words.mask)
        states = []
        for place in range(tokens_BU.shape[1]):
            states.append(self._next(torch.cat([tokens_BU[:, place : place + 1], mask_B1], 1), memory, cache)[:, -1:])
            cache.drop(1)  # the next word must not read that there was a mask here
        return self.lm_logits(torch.cat(states, 1))

    def room(self, memory: base.Memory) -> Tensor:
        """Return how many tokens it can write behind the prompt of each row [B]."""
        return self.config.text.context_length + self.config.beyond - memory.beside["given_BG"].sum(1)

    def _next(self, tokens_BU: Tensor, memory: base.Memory, cache: Cache) -> Tensor:
        """Return states [B, U, C] of tokens that follow those of a cache; of the prompt, its last one."""
        prompt_BG, given_BG = memory.beside["prompt_BG"], memory.beside["given_BG"]
        rows, given = prompt_BG.shape
        start = cache.length == 0
        if start:
            tokens_BU = torch.cat([prompt_BG, tokens_BU[:, 1:]], 1)
        written = cache.length + tokens_BU.shape[1] - given
        shortest = int(given_BG.sum(1).min())  # rows with longer prompts are done before, see `states`
        if shortest + written > self.config.text.context_length:
            raise ConfigError(
                f"model.text.context_length: {self.config.text.context_length} tokens are too few for a prompt of "
                f"{shortest} and {written} written after it; write less, or shorten the prompt"
            )
        new_BW = torch.ones(rows, written, dtype=torch.long, device=tokens_BU.device)
        blocks_BS = torch.cat([torch.full_like(prompt_BG, self.prompt_block), new_BW], 1)
        stream = Stream(blocks_BS, torch.cat([given_BG, new_BW.bool()], 1))
        index_B1 = torch.arange(rows, device=tokens_BU.device)[:, None]
        sight = Sight(memory.states_BSC, index_B1, memory.valid_BS)
        states_BTC = self.states(tokens_BU, stream, sight, cache=cache)
        if not start:
            return states_BTC
        last_B = given_BG.sum(1) - 1
        prompt_B1C = states_BTC[torch.arange(rows, device=last_B.device), last_B][:, None]
        return torch.cat([prompt_B1C, states_BTC[:, given:]], 1)


Model = FusedVLM


class FusedEncodings(vlm.Encodings):
    """What a model that fuses knows of a batch: pictures are encoded once, whoever reads them."""

    model: FusedVLM

    @cached_property
    def _vision(self) -> vision_towers.Output:
        if self.batch.image_NCHW is not None:
            return super()._vision
        assert self.batch.image_NE is None, "a picture's kept feature is not enough for text that reads its tokens"
        # ranks with and without pictures call the same modules: ZeRO-3 waits for all
        size, like = self.model.config.vision.image_size, self.model.bridge.linear.weight
        nothing_1CHW = torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device)
        with self.model.vision.unseen():
            return self.model.vision(nothing_1CHW, draw_N=torch.zeros(1, dtype=torch.long, device=like.device))

    @cached_property
    def _bridged(self) -> Tensor:
        return self.model.bridge(self.image_tokens)

    @cached_property
    def own_B(self) -> Tensor:
        """The first picture of each row, int64 [B]; -1 where it has none."""
        rows = len(self.batch)
        tokens_NPC = self.image_tokens
        row_B = torch.arange(rows, device=tokens_NPC.device)
        if self.batch.image_NCHW is None:
            return torch.full_like(row_B, -1)
        owner_N = self.batch.owner_N
        if owner_N is None:
            return row_B
        first_B = torch.searchsorted(owner_N, row_B).clamp(max=len(owner_N) - 1)
        return torch.where(owner_N[first_B] == row_B, first_B, -1)

    def sight(self, image_B: Tensor | None = None) -> Sight:
        """Return what rows read: the picture of that number, or several of [B, M]; -1: none. None: each its first."""
        index_B = self.own_B if image_B is None else image_B
        index_BM = index_B[:, None] if index_B.ndim == 1 else index_B
        tokens = self._bridged.shape[1]
        return Sight(self._bridged, index_BM.clamp(min=0), (index_BM >= 0).repeat_interleave(tokens, 1))

    def fuse(
        self,
        tokens_BT: Tensor,
        blocks_BT: Tensor,
        image_B: Tensor | None = None,
        valid_BT: Tensor | None = None,
        *,
        text_B: Tensor | None = None,
    ) -> Tensor:
        """Return states [B, T, C] of texts that read pictures.

        Args:
            tokens_BT: the texts.
            blocks_BT: who reads whom in them, see models/attention.py.
            image_B: which picture each row reads, [B], or pictures, [B, M]; -1: none. None: the first one of its own.
            valid_BT: False on padding; None: there is none.
            text_B: which of the texts each row reads; None: its own. The text tower sees each text once.
        """
        return self.model.states(tokens_BT, Stream(blocks_BT, valid_BT), self.sight(image_B), text_B=text_B)

    def lm_logits(self, states_BTC: Tensor) -> Tensor:
        """Return the score of each word [B, T, V]."""
        return self.model.lm_logits(states_BTC)

    def match_logits(self, states_BTC: Tensor) -> Tensor:
        """Return scores [B, 2] of no match and match; see FusedVLM."""
        return self.model.match_logits(states_BTC)

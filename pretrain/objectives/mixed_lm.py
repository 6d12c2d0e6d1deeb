"""One text, two masks: read both ways to say hidden words, or causally to say what comes (UniVL, arXiv:2112.05587).

Liu et al. 2021, arXiv:2112.05587: the idea only, no code was published; the recipes are those of its relatives.

    L = mlm * -(1 / hidden words) sum over bidirectional rows of log p(y_t | the rest, picture)
      + lm  * -(1 / words)        sum over causal rows of log p(y_t | y_<t, picture)

What is given to a row, its prompt, is read both ways under either mask, as it is when the model writes behind it.
Both counts are those of the whole step, so that the weight of a word does not hang on how many rows each rank drew.

    shifted         causal rows are whole and say the next word (Li et al. 2022, BLIP, arXiv:2201.12086)
    masked_causal   words are hidden in causal rows too, the end token among them, and said where they are hidden
                    (UniLM, arXiv:1905.03197; VLP, arXiv:1909.11059); needs model.fusion.predict=masked

Shapes: B = rows, R = rows of the pass: B, or 2 B where each row comes under both masks; T = tokens.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.draws import uniform
from pretrain.losses.targets import Hiding, next_words, written_blocks
from pretrain.losses.tokens import IGNORE, count_B, token_sum
from pretrain.models.fused_vlm import FusedEncodings
from pretrain.objectives import base


class Config(base.Config):
    """`objectives.mixed_lm`."""

    p_causal: float = Field(default=0.5, ge=0, le=1)  #: how likely a row, or a step, is causal; VLP's best was 0.75
    #: per_sample: each row's hash says; per_batch: all rows of a step alike; both: each row twice, at twice the price
    mixing: Literal["per_sample", "per_batch", "both"] = "per_sample"
    recipe: Literal["shifted", "masked_causal"] = "shifted"
    share: float = Field(default=0.15, gt=0, lt=1)  #: of words that are hidden
    mlm: float = Field(default=1.0, ge=0)  #: weight of hidden words
    lm: float = Field(default=1.0, ge=0)  #: weight of causal rows
    seed: int = 0  #: of per_batch, which draws from (seed, step)


class Objective(base.Objective):
    """Masked and causal language modelling in one pass."""

    needs = ("fuse", "cloze")
    config: Config

    def attach(self, model: Any) -> None:
        """Learn which ids are no words, and whether the model writes as it is trained here.

        Raises:
            ConfigError: it does not.
        """
        self.hiding = Hiding(self.config.share, *base.vocabulary_of(model))
        self.end, self.prompt_block = model.words.end, model.prompt_block
        wanted = {"shifted": "next", "masked_causal": "masked"}[self.config.recipe]
        if model.config.fusion.predict != wanted:
            raise ConfigError(
                f"objectives.mixed_lm.recipe: {self.config.recipe} trains a model that writes the "
                f"{'next word' if wanted == 'next' else 'word at a mask'}; set model.fusion.predict={wanted}"
            )

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Draw each row's mask and hidden words, and count what both kinds of rows have to say."""
        tokens_BT, labels_BT, draw_B = batch.tokens_BT, batch.labels_BT, batch.draw_B
        assert tokens_BT is not None and labels_BT is not None and draw_B is not None
        assert batch.valid_BT is not None
        causal_R = self.causal(draw_B, step)
        blocks_BT = written_blocks(labels_BT, batch.valid_BT, self.prompt_block)
        if self.config.mixing == "both":
            tokens_BT, labels_BT, draw_B = tokens_BT.repeat(2, 1), labels_BT.repeat(2, 1), draw_B.repeat(2)
        learnt_RT, words_RT = labels_BT != IGNORE, self.hiding.words(tokens_BT)
        cloze = self.hiding(tokens_BT, learnt_RT & words_RT, draw_B)
        shown_RT, said_RT = tokens_BT, next_words(labels_BT)
        if self.config.recipe == "masked_causal":
            shown_RT, said_RT = self.hiding(tokens_BT, learnt_RT & (words_RT | (tokens_BT == self.end)), draw_B)
        causal_R1 = causal_R[:, None]
        labels_RT = torch.where(causal_R1, said_RT, cloze.labels_BT)
        words_R = count_B(labels_RT)
        draws = {
            "tokens_RT": torch.where(causal_R1, shown_RT, cloze.tokens_BT),
            "blocks_RT": causal_R1 * blocks_BT.repeat(len(causal_R) // len(blocks_BT), 1),
            "labels_RT": labels_RT,
            "causal_R": causal_R,
        }
        return base.Prepared(draws, torch.stack([(words_R * ~causal_R).sum(), (words_R * causal_R).sum()]))

    def causal(self, draw_B: Tensor, step: int) -> Tensor:
        """Return which rows of the pass are causal, bool [R]."""
        if self.config.mixing == "both":
            return torch.arange(2 * len(draw_B), device=draw_B.device) >= len(draw_B)
        if self.config.mixing == "per_batch":
            draw_B = torch.full_like(draw_B, dist.hash64("mixed_lm", self.config.seed, step))
        return uniform(draw_B, 1, "causal")[:, 0] < self.config.p_causal

    def forward(self, encodings: FusedEncodings, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's share of the loss, and its two terms."""
        draws, valid_BT, image_B = prepared.draws, encodings.batch.valid_BT, encodings.own_B
        assert valid_BT is not None and prepared.count is not None
        times = len(draws["tokens_RT"]) // len(valid_BT)
        states_RTC = encodings.fuse(
            draws["tokens_RT"], draws["blocks_RT"], image_B.repeat(times), valid_BT.repeat(times, 1)
        )
        weight_B = encodings.batch.weight_B
        weight_R = None if weight_B is None else weight_B.repeat(times)
        loss_R = token_sum(encodings.lm_logits(states_RTC), draws["labels_RT"], weight_B=weight_R)
        mlm = base.over((loss_R * ~draws["causal_R"]).sum(), prepared.count[0])
        lm = base.over((loss_R * draws["causal_R"]).sum(), prepared.count[1])
        return self.config.mlm * mlm + self.config.lm * lm, {"mlm": mlm / prepared.part, "lm": lm / prepared.part}

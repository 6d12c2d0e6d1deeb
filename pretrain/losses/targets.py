"""What a text is trained to say at each place: the word that comes next, or the one that was hidden there.

Shapes: B = rows, T = tokens. Labels are ids, and IGNORE where a place does not count.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.draws import uniform
from pretrain.losses.tokens import IGNORE


def next_words(labels_BT: Tensor) -> Tensor:
    """Return at each place the label of the place after it; the last one has none."""
    return torch.cat([labels_BT[:, 1:], torch.full_like(labels_BT[:, :1], IGNORE)], 1)


def written_blocks(labels_BT: Tensor, valid_BT: Tensor, prompt_block: int) -> Tensor:
    """Return the blocks of causal text behind what is given, int64 [B, T], as it is read when a model writes.

    Args:
        labels_BT: IGNORE where a token is given.
        valid_BT: False on padding.
        prompt_block: 0: what is given is read both ways; 1: it is causal too.
    """
    given_BT = valid_BT & (labels_BT == IGNORE)
    return torch.where(given_BT, prompt_block, torch.ones_like(labels_BT))


class Cloze(NamedTuple):
    """A text with hidden words."""

    tokens_BT: Tensor
    labels_BT: Tensor  #: the word where one is hidden, IGNORE elsewhere


class Hiding(NamedTuple):
    """How words are hidden: of those drawn, 80 % by the mask token, 10 % by a random word, 10 % not at all.

    Devlin et al. 2018 (BERT, arXiv:1810.04805), section 3.1.
    """

    share: float  #: of the words that may be hidden
    size: int  #: of the vocabulary
    mask: int
    specials: tuple[int, ...]  #: ids that are no words, the mask among them

    def words(self, tokens_BT: Tensor) -> Tensor:
        """Return which tokens are words, bool [B, T]."""
        return ~torch.isin(tokens_BT, tokens_BT.new_tensor(self.specials))

    def __call__(self, tokens_BT: Tensor, able_BT: Tensor, draw_B: Tensor) -> Cloze:
        """Return a text in which a share of the `able_BT` tokens is hidden, as each sample's hash has it."""
        length = tokens_BT.shape[1]
        hidden_BT = able_BT & (uniform(draw_B, length, "cloze") < self.share)
        how_BT, which_BT = uniform(draw_B, length, "cloze: how"), uniform(draw_B, length, "cloze: which")
        random_BT = (which_BT * (self.size - len(self.specials))).long()
        for special in sorted(self.specials):  # count past what is no word
            random_BT = random_BT + (random_BT >= special)
        shown_BT = torch.where(how_BT < 0.8, self.mask, torch.where(how_BT < 0.9, random_BT, tokens_BT))
        return Cloze(torch.where(hidden_BT, shown_BT, tokens_BT), torch.where(hidden_BT, tokens_BT, IGNORE))

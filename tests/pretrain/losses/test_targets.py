"""What is hidden of a text: the right share, never a special, the same for a sample wherever it comes."""

import torch

from pretrain.losses.targets import Hiding, next_words
from pretrain.losses.tokens import IGNORE

SPECIALS = (0, 7, 19)
HIDING = Hiding(0.15, 20, 7, SPECIALS)


def texts(rows: int = 3000, length: int = 12):
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 20, (rows, length), generator=draw)
    tokens_BT[tokens_BT == 7] = 8
    return tokens_BT, torch.arange(rows) * 99991


def test_shares_of_hidden_shown_and_random_words() -> None:
    tokens_BT, draw_B = texts()
    able_BT = HIDING.words(tokens_BT)
    cloze = HIDING(tokens_BT, able_BT, draw_B)
    hidden_BT = cloze.labels_BT != IGNORE
    assert not (hidden_BT & ~able_BT).any() and torch.equal(cloze.tokens_BT[~hidden_BT], tokens_BT[~hidden_BT])
    assert torch.equal(cloze.labels_BT[hidden_BT], tokens_BT[hidden_BT])
    assert abs(hidden_BT.sum() / able_BT.sum() - 0.15) < 0.006
    shown = cloze.tokens_BT[hidden_BT]
    assert abs((shown == 7).double().mean() - 0.8) < 0.02
    same = (shown == tokens_BT[hidden_BT]).double().mean()
    assert abs(same - (0.1 + 0.1 / 17)) < 0.02  # a random word is the word itself once in 17
    swapped = shown[(shown != 7) & (shown != tokens_BT[hidden_BT])]
    assert set(swapped.tolist()) == set(range(20)) - set(SPECIALS), "a random word is any word, and no special"


def test_a_sample_loses_the_same_words_in_any_batch() -> None:
    tokens_BT, draw_B = texts(20)
    able_BT = HIDING.words(tokens_BT)
    whole, part = HIDING(tokens_BT, able_BT, draw_B), HIDING(tokens_BT[3:5, :9], able_BT[3:5, :9], draw_B[3:5])
    assert torch.equal(whole.tokens_BT[3:5, :9], part.tokens_BT)
    again = HIDING(tokens_BT, able_BT, draw_B + 1)
    assert not torch.equal(whole.tokens_BT, again.tokens_BT), "another epoch, another hash"


def test_next_words() -> None:
    assert next_words(torch.tensor([[IGNORE, 5, 6, IGNORE]])).tolist() == [[5, 6, IGNORE, IGNORE]]

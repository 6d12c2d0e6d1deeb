"""Statements about pictures: accuracy, and consistency over the pictures of a sentence (Suhr et al. 2019,
arXiv:1811.00491)."""

from collections.abc import Sequence

from pretrain.metrics.interval import Score, proportion


def accuracy(right_N: Sequence[bool]) -> Score:
    """Return the share of right answers."""
    return proportion(sum(right_N), len(right_N))


def consistency(sentence_N: Sequence[str], right_N: Sequence[bool]) -> Score:
    """Return the share of different sentences for which every answer is right."""
    whole: dict[str, bool] = {}
    for sentence, right in zip(sentence_N, right_N, strict=True):
        whole[sentence] = whole.get(sentence, True) and bool(right)
    return proportion(sum(whole.values()), len(whole))

"""Scores of answers, boxes, statements, surprise and translations: hand-computed cases."""

import math

import pytest
import torch

from pretrain.metrics import grounding, nlvr, perplexity, translation, vqa
from pretrain.metrics.interval import Score, mean, proportion, resampled


def test_vqa_table() -> None:
    for agree, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        people = ["red"] * agree + [f"other{n}" for n in range(10 - agree)]
        assert vqa.soft_accuracy("Red.", people) == pytest.approx(expected)
    assert vqa.soft_accuracy("red", ["red"] * 10) == 1


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("The Cat.", "cat"), ("two dogs", "2 dogs"), ("dont know", "don't know"), ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"), ("1,000", "1000"), ("3.5 m.", "3.5 m"), ("none", "0"), ("a\nb", "b"),
        ("couldnt've", "couldn't've"), ("yall'd've", "y'all'd've"), ("twas", "'twas"), ("a/c", "c"),
        ("shes", "shes"), ("it's", "it's"), ("somebody'd", "somebodyd"), ("hello?world", "hello world"),
    ],
)  # fmt: skip
def test_vqa_normalisation(said: str, expected: str) -> None:
    assert vqa.normalised(said) == expected


def test_what_people_said_keeps_articles_and_numbers() -> None:
    """Only punctuation goes, and only where people disagree: a quirk of the official script."""
    assert vqa.soft_accuracy("two", ["two"] * 9 + ["2"]) == pytest.approx(0.3)
    assert vqa.soft_accuracy("x-ray", ["x-ray"] * 10) == 0
    assert vqa.soft_accuracy("x-ray", ["x-ray"] * 9 + ["bone"]) == 1


def test_weights_of_answers() -> None:
    assert vqa.weight("The red one!", {"red 1": 0.6, "red": 1.0}) == 0.6
    assert vqa.weight("blue", {"red": 1.0}) == 0
    score = vqa.accuracy([1.0, 0.3, 0.0])
    assert score.value == pytest.approx(1.3 / 3) and 0 < score.low < score.value < score.high < 1


def test_iou_by_hand() -> None:
    left = torch.tensor([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0.0, 0, 1, 1]])
    right = torch.tensor([[1, 1, 3, 3], [0, 0, 1, 1], [1, 0, 2, 1], [0, 0, 0, 0], [0.0, 0, 1, 2]])
    assert grounding.iou(left, right).tolist() == pytest.approx([1 / 7, 1, 0, 0, 0.5])
    assert grounding.covered(left, right).tolist() == pytest.approx([1 / 4, 1, 0, 0, 1])
    assert grounding.accuracy(grounding.iou(left, right).tolist()).value == pytest.approx(2 / 5)


def test_consistency() -> None:
    said, right = ["a", "a", "b", "c"], [True, False, True, True]
    assert nlvr.accuracy(right).value == 0.75
    assert nlvr.consistency(said, right) == proportion(2, 3)


def test_perplexity() -> None:
    score = perplexity.perplexity([math.log(8), math.log(2)], [1, 3])
    assert score.value == pytest.approx(2.0) and score.unit == "" and str(score).startswith("2.00 [")
    assert perplexity.bits_per_byte([math.log(8)] * 2, [3, 3]).value == pytest.approx(1.0)
    assert perplexity.perplexity([1e6], [1]).value < math.inf


def test_resampling() -> None:
    """The interval of a mean is that of the normal approximation; equal rows give a point."""
    source = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=source).tolist()
    score = mean(values, unit="points")
    width = 2 * 1.96 * torch.tensor(values).std().item() / 20
    assert score.high - score.low == pytest.approx(width, rel=0.1)
    assert mean([2.0, 2.0], unit="") == Score(2.0, 2.0, 2.0, 2, "")
    assert mean(values, unit="points") == score
    with pytest.raises(ValueError, match="zero samples"):
        resampled([], len, unit="")


def test_translation() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    written = ["a cat is on the mat .", "Two dogs run", "he said nothing at all to the man"]
    references = [["the cat is on the mat ."], ["two dogs are running"], ["he said nothing at all to a man"]]
    for lowercase in (False, True):
        theirs = sacrebleu.corpus_bleu(written, [[r[0] for r in references]], lowercase=lowercase).score
        score = translation.bleu(written, references, lowercase=lowercase)
        assert 100 * score.value == pytest.approx(theirs)
        assert score.low <= score.value <= score.high

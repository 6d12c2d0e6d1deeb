"""Caption scores: the numbers of pycocoevalcap 1.2 on a fixed example, its edge cases, and itself where installed."""

import importlib.util
import random
import shutil

import pytest

from pretrain.config import ConfigError
from pretrain.metrics import caption, words

REFERENCES = [
    ["a cat sits on the mat", "the cat is on a mat"],
    ["two dogs run in the park", "dogs running through a park"],
    ["a man rides a red bike", "a person riding a bicycle"],
]
WRITTEN = ["a cat sits on a mat", "two dogs run in the park", "a man on a bike"]
JAVA = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None


def split(references: list[list[str]], written: list[str]) -> tuple:
    return [w.split() for w in written], [[r.split() for r in several] for several in references]


def test_the_golden_example() -> None:
    written, references = split(REFERENCES, WRITTEN)
    found = caption.scores(written, references)
    expected = {"CIDEr-D": 3.76222667, "BLEU-1": 0.88235294, "BLEU-2": 0.83263276, "BLEU-3": 0.76126778,
                "BLEU-4": 0.68532346, "ROUGE-L": 0.84962529}  # fmt: skip
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected, abs=1e-7)
    assert all(score.low <= score.value <= score.high and score.count == 3 for score in found.values())
    known = caption.Documents(references)
    each = [known.cider_d(text, several) for text, several in zip(written, references)]
    assert each == pytest.approx([4.755346, 5.54394707, 0.98738695], abs=1e-6)
    assert str(found["CIDEr-D"]).startswith("376.2 [98.7, ")


def test_edges() -> None:
    one = caption.scores(*split(REFERENCES[:1], WRITTEN[:1]))
    assert one["CIDEr-D"].value == 0, "of one picture nothing is rare"
    same = [["a red cat sleeps"], ["two dogs run fast"]]
    assert caption.scores(*split(same, [s[0] for s in same]))["CIDEr-D"].value == pytest.approx(10.0)
    short = [["red cat"], ["two dogs"]]
    assert caption.scores(*split(short, [s[0] for s in short]))["CIDEr-D"].value == pytest.approx(5.0)
    nothing = caption.scores(*split(same, ["", ""]))
    assert all(score.value == pytest.approx(0.0, abs=1e-6) for score in nothing.values())


def test_simple_words() -> None:
    assert words.split(["A man's dog, running -- fast!"], "simple") == [["a", "man's", "dog", "running", "fast"]]


@pytest.mark.skipif(JAVA, reason="pycocoevalcap and Java are here")
def test_without_java_ptb_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs pycocoevalcap and Java"):
        words.split(["a"], "ptb")


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed")
def test_pycocoevalcap_says_the_same() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    draw = random.Random(0)
    known = ["a", "the", "cat", "dog", "runs", "sits", "on", "in", "red", "park"]

    def line() -> str:
        return " ".join(draw.choices(known, k=draw.randint(1, 9)))

    references = [[line() for _ in range(draw.randint(1, 5))] for _ in range(40)]
    written = [line() for _ in references]
    gts, res = dict(enumerate(references)), {n: [w] for n, w in enumerate(written)}
    mine = {name: score.value for name, score in caption.scores(*split(references, written)).items()}
    bleus = Bleu(4).compute_score(gts, res, verbose=0)[0]
    theirs = {f"BLEU-{n + 1}": value for n, value in enumerate(bleus)}
    theirs |= {"CIDEr-D": Cider().compute_score(gts, res)[0], "ROUGE-L": Rouge().compute_score(gts, res)[0]}
    assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.skipif(not JAVA, reason="needs pycocoevalcap and Java")
def test_ptb_and_meteor() -> None:
    assert words.split(["A cat isn't on\nthe mat, is it?", ""], "ptb") == [
        ["a", "cat", "is", "n't", "on", "the", "mat", "is", "it"],
        [],
    ]
    text, references = "a cat sits on a mat", ["a cat sits on the mat", "the cat is n't on a mat"]
    score = words.meteor([text.split()], [[r.split() for r in references]])
    assert score.value == pytest.approx(0.458762, abs=1e-6)
    assert score.low <= score.value <= score.high

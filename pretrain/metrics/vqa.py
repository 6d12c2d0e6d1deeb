"""Answers to questions about pictures: VQA's soft accuracy, with the official script's idea of equal answers.

Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837. Two quirks of the script are kept for parity:
a full stop goes unless a digit follows it, whatever comes before, and at most 32 of them go.
"""

import re
from collections.abc import Mapping, Sequence

from pretrain.metrics.interval import Score, proportion

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(n) for n, word in enumerate(DIGITS.split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
# what a word becomes when one of its apostrophes was left out
FULL = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:n] + word[n + 1 :]: word for word in FULL.split() for n, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the script has it

_STOP = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")


def punctuated(answer: str) -> str:
    """Return an answer without punctuation: a sign goes where a blank is beside one, else it becomes a blank."""
    out = answer
    for letter in PUNCTUATION:
        gone = f"{letter} " in answer or f" {letter}" in answer or _COMMA.search(answer)
        out = out.replace(letter, "" if gone else " ")
    return _STOP.sub("", out, count=32)


def normalised(answer: str) -> str:
    """Return an answer as predictions are compared: no punctuation, digits for numbers, no articles, apostrophes."""
    words = punctuated(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def soft_accuracy(prediction: str, people: Sequence[str]) -> float:
    """Return the mean over leaving one of the people out of min(those of the others who agree / 3, 1).

    Of ten people 0, 1, 2, 3 and 4 who agree give 0, 0.3, 0.6, 0.9 and 1. What people said is compared without
    punctuation, unless all said the same.
    """
    said = list(people) if len(set(people)) == 1 else [punctuated(answer) for answer in people]
    same = [answer == normalised(prediction) for answer in said]
    return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(same)


def weight(prediction: str, weights: Mapping[str, float]) -> float:
    """Return the weight of the answer that equals a prediction, 0 where none does; GQA: one answer of weight 1."""
    mine = normalised(prediction)
    return max((value for answer, value in weights.items() if normalised(answer) == mine), default=0.0)


def accuracy(values_N: Sequence[float]) -> Score:
    """Return the mean of soft accuracies in [0, 1]."""
    return proportion(sum(values_N), len(values_N))

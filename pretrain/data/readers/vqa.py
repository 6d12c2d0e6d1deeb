"""A picture, a question about it, and its answers with weights.

Source: an image and a question with answers in one of the forms below; VQA v2, GQA, easy-VQA and OFA's tables fit as
they are. The prefix is the question, the suffix one answer: drawn by weight (Cho et al. 2021, arXiv:2102.02779), the
heaviest one, or the first. All weights are in `meta["answer_scores"]`, what the json itself says stays beside it.

    "answer": "red"                                             one answer
    "answers": ["red", "red", "dark red", ...]                  what people said; weights are VQA's soft scores
    "answers": [{"answer": "red", "answer_confidence": "yes"}]  likewise (VQA v2)
    "answers": {"red": 1.0, "dark red": 0.3}                    weights
    "answers": "1.0|!+red&&0.3|!+dark red"                      weights (Wang et al. 2022, arXiv:2202.03052)

The soft score of an answer that n of N people gave is the mean over N - 1 of them of min(matches / 3, 1): with ten
people 0.3, 0.6, 0.9 and 1 (Antol et al. 2015, arXiv:1505.00468).
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from pretrain.batch import Example, Record
from pretrain.config import Section
from pretrain.data import fields
from pretrain.data.decode import IMAGES, BadSample
from pretrain.data.readers import base


class Config(Section):
    """Where the picture, the question and its answers lie in a sample."""

    image: list[str] = Field(default_factory=lambda: list(IMAGES))  #: extensions, the first that is there
    question: list[str] = Field(default_factory=lambda: ["json:question", "question.txt", "txt"])
    answers: list[str] = Field(
        default_factory=lambda: ["json:answers", "json:answer", "json:multiple_choice_answer", "answer.txt"]
    )  #: an empty list: questions without answers, as in a test split
    items: fields.Path | None = None  #: a list of objects that hold both, one drawn an epoch; none: one a sample
    choose: Literal["weight", "heaviest", "first"] = "weight"  #: which answer becomes the suffix
    prompt: fields.Template = "{}"  #: the prefix, with a hole for the question


class Reader(base.Reader):
    """Reads an image, a question and the answers to it."""

    config: Config

    def read(self, record: Record) -> Example:
        config = self.config
        meta = fields.draw_item(self.meta(record), config.items, record.draw)
        found, source = fields.first(record, meta, config.question, "question")
        question = fields.draw_text(found, f"question in {source}", record.draw, "question")
        scores: dict[str, float] = {}
        if config.answers:
            found, source = fields.first(record, meta, config.answers, "answer")
            scores = weigh(found, f"answer in {source}")
        return Example(
            record.key,
            [self.image(record, tuple(config.image))],
            prefix=fields.fill(config.prompt, question),
            suffix=_choose(scores, config.choose, record.draw) if scores else "",
            meta={**meta, "answer_scores": scores},
            draw=record.draw,
            shard=record.shard,
        )


def weigh(found: Any, what: str) -> dict[str, float]:
    """Return the weight of each answer, in the order in which they are first given.

    Raises:
        BadSample: none of the forms above, or no answer with a weight above zero.
    """
    if isinstance(found, str) and "|!+" in found:
        found = _table(found, what)
    if isinstance(found, str):
        return {fields.text(found, what): 1.0}
    if isinstance(found, dict):
        scores = {fields.text(answer, what): _weight(value, what) for answer, value in found.items()}
        if not any(scores.values()):
            raise BadSample(f"{what} has no weight above zero")
        return scores
    if not isinstance(found, list) or not found:
        raise BadSample(f"{what} is a {type(found).__name__} without answers")
    said = [fields.text(one.get("answer") if isinstance(one, dict) else one, what) for one in found]
    counts = {answer: said.count(answer) for answer in dict.fromkeys(said)}
    scores = {answer: soft_score(count, len(said)) for answer, count in counts.items()}
    return scores if any(scores.values()) else {answer: count / len(said) for answer, count in counts.items()}


def soft_score(count: int, people: int) -> float:
    """Return VQA's accuracy of an answer that `count` of `people` gave: the mean over leaving one of them out."""
    return (count * min((count - 1) / 3, 1.0) + (people - count) * min(count / 3, 1.0)) / people


def _table(found: str, what: str) -> dict[str, float]:
    scores = {}
    for cell in found.split("&&"):
        weight, mark, answer = cell.partition("|!+")
        try:
            scores[answer] = float(weight)
        except ValueError:
            mark = ""
        if not mark:
            raise BadSample(f"{what}: {cell!r} is not of the form weight|!+answer")
    return scores


def _weight(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e6:
        raise BadSample(f"{what}: {value!r} is no weight")
    return float(value)


def _choose(scores: dict[str, float], how: str, draw: int) -> str:
    answers, weights = list(scores), np.array(list(scores.values()))
    if how == "first":
        return answers[0]
    if how == "heaviest":
        return answers[int(weights.argmax())]
    edges = weights.cumsum()
    place = fields.draw_below(2**52, draw, "answer") / 2**52 * edges[-1]
    return answers[int(np.searchsorted(edges, place, side="right"))]

"""Answers in every form that data sets write them, their weights, and which one is drawn."""

from collections import Counter

import pytest

from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.readers import base, vqa
from tests.tiny import record

QUESTION = "what colour?"


def read(answers: object, draw: int = 0, **options: object):
    return base.make({"vqa": options}).read(record(draw, json={"question": QUESTION, "answers": answers}))


def test_soft_scores_are_the_leave_one_out_mean():
    assert [round(vqa.soft_score(n, 10), 6) for n in range(1, 11)] == [0.3, 0.6, 0.9, *[1.0] * 7]
    for people in (1, 3, 10):
        for count in range(1, people + 1):  # by definition: leave each one out, count the matches among the others
            others = [count - 1] * count + [count] * (people - count)
            assert vqa.soft_score(count, people) == pytest.approx(sum(min(n / 3, 1) for n in others) / people)


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        ("red", {"red": 1.0}),
        (["red"] * 8 + ["pink", " blue "], {"red": 1.0, "pink": 0.3, "blue": 0.3}),
        ([{"answer": "red", "answer_confidence": "yes", "answer_id": 1}] * 10, {"red": 1.0}),
        (["red"], {"red": 1.0}),  # one voice alone has no other to agree with
        ({"red": 1, "pink": 0.3}, {"red": 1.0, "pink": 0.3}),
        ("1.0|!+red&&0.3|!+dark red", {"red": 1.0, "dark red": 0.3}),
        ("0.6|!+no", {"no": 0.6}),
    ],
)
def test_forms(answers, scores):
    example = read(answers)
    assert example.prefix == QUESTION and example.suffix in scores
    assert example.meta["answer_scores"] == pytest.approx(scores)
    assert example.meta["answers"] == answers, "what people said is kept for the metric"


def test_drawn_by_weight():
    drawn = Counter(read({"a": 3.0, "b": 1.0, "never": 0.0}, draw).suffix for draw in range(2000))
    assert set(drawn) == {"a", "b"} and abs(drawn["a"] / 2000 - 0.75) < 0.04  # four standard deviations
    assert {read({"a": 1, "b": 3}, draw, choose="heaviest").suffix for draw in range(20)} == {"b"}
    assert {read({"a": 1, "b": 3}, draw, choose="first").suffix for draw in range(20)} == {"a"}


def test_sources_of_other_sets():
    gqa = record(json={"question": "is it red?", "answer": "yes", "fullAnswer": "yes, it is red."})
    assert base.make({"vqa": {}}).read(gqa).suffix == "yes"
    assert base.make({"vqa": {"answers": ["json:fullAnswer"]}}).read(gqa).suffix == "yes, it is red."
    plain = record(txt=b"is it red?", **{"answer.txt": b"no\n"})
    assert base.make({"vqa": {}}).read(plain).suffix == "no"
    test_split = base.make({"vqa": {"answers": [], "prompt": "question: {} answer:"}}).read(gqa)
    assert (test_split.prefix, test_split.suffix) == ("question: is it red? answer:", "")


def test_several_questions_of_one_picture():
    several = {"image_id": 7, "qa": [{"question": q, "answer": f"to {q}"} for q in "abc"]}
    found = [base.make({"vqa": {"items": "json:qa"}}).read(record(draw, json=several)) for draw in range(40)]
    assert {example.prefix for example in found} == {"a", "b", "c"}
    assert all(example.suffix == f"to {example.prefix}" and example.meta["image_id"] == 7 for example in found)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (None, "no answer: none of json:answers"),
        ([], "without answers"),
        ([""], "empty"),
        ([{"said": "red"}], "expected text"),
        ({"red": -1}, "no weight"),
        ({"red": 0}, "no weight above zero"),
        ("1.0|!+red&&pink", "not of the form"),
    ],
)
def test_bad_answers(answers, words):
    with pytest.raises(BadSample, match=words):
        read(answers)


def test_bad_options():
    with pytest.raises(ConfigError, match="hole"):
        base.make({"vqa": {"prompt": "question:"}})
    with pytest.raises(ConfigError, match="json:KEY"):
        base.make({"vqa": {"items": "qa"}})

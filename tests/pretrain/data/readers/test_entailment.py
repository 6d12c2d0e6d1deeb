"""Labels in words and numbers, premises, and templates whose holes are filled once."""

import pytest

from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.readers import base
from tests.soak.fuzz import encoded
from tests.tiny import record


def read(options: dict | None = None, **meta: object):
    tree = {"hypothesis": "a dog {premise} runs", "premise": "an animal {}", "gold_label": "neutral", **meta}
    return base.make({"entailment": options or {}}).read(record(json=tree))


def test_label_and_target():
    for label, suffix, target in (("entailment", "yes", 0), ("neutral", "maybe", 1), (2, "no", 2)):
        example = read(gold_label=label)
        assert (example.suffix, example.target) == (suffix, target)
    nlvr = {"hypothesis": ["json:sentence"], "labels": {"true": "true", "false": "false"}}
    for label, suffix in ((True, "true"), ("false", "false"), (0, "true")):
        assert read(nlvr, sentence="two dogs", gold_label=label).suffix == suffix


def test_premise_and_prompt():
    assert read().prefix == "a dog {premise} runs"
    assert read({"premise": ["json:premise"]}).prefix == "an animal {} a dog {premise} runs"
    prompt = 'can image and text1 "{premise}" imply text2 "{}"?'
    assert read({"premise": ["json:premise"], "prompt": prompt}).prefix == (
        'can image and text1 "an animal {}" imply text2 "a dog {premise} runs"?'
    )


def test_two_pictures():
    options = {"image": ["left.png"], "second": ["right.png"], "labels": {"true": "true", "false": "false"}}
    pictures = {"left.png": encoded("RGB", "PNG", (3, 2)), "right.png": encoded("RGB", "PNG", (5, 4))}
    tree = {"sentence": "two dogs", "label": True}
    example = base.make({"entailment": options}).read(record(json=tree, **pictures))
    assert [image.shape for image in example.images] == [(2, 3, 3), (4, 5, 3)] and example.suffix == "true"
    with pytest.raises(BadSample, match="no image member"):
        base.make({"entailment": options}).read(record(json=tree, **{"left.png": pictures["left.png"]}))


@pytest.mark.parametrize("label", ["-", 3, -1, None, 1.0, ["neutral"]])
def test_no_such_label(label):
    with pytest.raises(BadSample, match=r"expected one of entailment, neutral, contradiction|no label"):
        read(gold_label=label)


@pytest.mark.parametrize("options", [{"prompt": "{premise} {}"}, {"prompt": "x"}, {"labels": {}}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=r"data\.reader\.entailment"):
        base.make({"entailment": options})

"""OFA's instructions as they are printed, and the laws of what is drawn."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pretrain.batch import Example
from pretrain.config import ConfigError
from pretrain.data import bins
from pretrain.data.decode import BadSample
from pretrain.data.instructions import base, ofa
from pretrain.data.picture import Picture
from pretrain.data.symbols import plain, symbol

IMAGE = [np.zeros((2, 2, 3), dtype=np.uint8)]
BOX = np.array([[0.25, 0.5, 0.75, 1.0]], dtype=np.float32)
TWO = np.array([[0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1]], dtype=np.float32)
BINS = "<bin_250> <bin_500> <bin_749> <bin_999>"  # of a picture of 512 pixels


def another(number: int) -> Example:
    return Example(f"k{number % 50}", [], suffix=f"caption {number % 50}", shard="a.tar")


def made(task: str, **options) -> base.Instruction:
    return base.make({"ofa": {"tasks": [task], **options}}, others=another)


def example(**given) -> Example:
    return Example("k0", list(IMAGE), shard="a.tar", **given)


CODES = {"suffix": symbol("<code_3>"), "codes": True}
CAR = {"prefix": "Red car", "boxes_K4": BOX}
QA = {"prefix": "What is it", "suffix": "dog", "meta": {"answer_scores": {"Cat": 0.9, "dog": 0.3}}}
TEXTS = {"prefix": "A B", "suffix": "yes", "meta": {"texts": ["A b", "C"]}}
GOLDENS = [
    ("caption", {"suffix": "A Red cat."}, " what does the image describe?", " a red cat.", 1),
    ("classify", {"suffix": "Great White Shark"}, " what does the image describe?", " great white shark", 1),
    ("transcribe", {"suffix": "STOP"}, " what are the texts on the image?", " stop", 1),
    ("vqa", QA, " what is it", " cat", 0.9),
    ("question", QA, " what is it?", " cat", 0.9),
    ("locate", CAR, ' which region does the text " red car " describe?', BINS, 1),
    ("describe", CAR, f"  what does the region describe? region: {BINS}", " red car", 1),
    ("detect", {"boxes_K4": TWO, "meta": {"names": ["Car", "sky"]}}, " what are the objects in the image?",
     f"{BINS} car <bin_0> <bin_0> <bin_999> <bin_999> sky", 2),
    ("infill_image", CODES, " what is the image in the middle part?", "<code_3>", 2),
    ("text_to_image", {"prefix": "A Cat", **CODES}, " what is the complete image? caption: a cat", "<code_3>", 1),
    ("entail", {"prefix": "It is red", "suffix": "maybe"}, ' does the image describe " it is red "?', " maybe", 1),
    ("entail", TEXTS, ' can image and text1 " a b " imply text2 " c "?', " yes", 1),
    ("mnli", TEXTS, ' can text1 " a b " imply text2 " c "?', " yes", 1),
    ("rte", TEXTS, ' can text1 " a b " imply text2 " c "?', " yes", 1),
    ("mrpc", TEXTS, ' does text1 " a b " and text2 " c " have the same semantics?', " yes", 1),
    ("qqp", TEXTS, ' is question " a b " and question " c " equivalent?', " yes", 1),
    ("qnli", TEXTS, ' does " a b " contain the answer to question " c "?', " yes", 1),
    ("sst2", {"suffix": "Positive", "meta": {"texts": ["Fine {}"]}},
     ' is the sentiment of text " fine {} " positive or negative?', " positive", 1),
    ("cola", {"suffix": "no", "meta": {"texts": ["a b"]}}, ' is the text " a b " grammatically correct?', " no", 1),
    ("summarise", {"prefix": "Long text", "suffix": "Short"},
     ' what is the summary of article " long text "?', " short", 1),
]  # fmt: skip


@pytest.mark.parametrize("task, given, prefix, suffix, weight", GOLDENS)
def test_goldens(task, given, prefix, suffix, weight):
    found = made(task).lay(example(**given), 512)
    assert (plain(found.prefix), plain(found.suffix), found.weight) == (prefix, suffix, weight)
    assert bool(found.images) == (task not in (*ofa.FRAMES, "text_to_image"))
    assert found.hole == (task == "infill_image")
    assert found.codes_alone == (task == "text_to_image"), "in pretraining codes are learned among all tokens"
    assert found.codes == ("image" in task and task != "text" and "codes" in given)


def test_every_task_has_a_golden_or_a_law():
    assert {task for task, *_ in GOLDENS} | {"match", "match_answer", "infill_text"} == set(ofa.Task.__args__)


def test_infilled_text_shows_masks_and_says_all():
    found = made("infill_text").lay(example(suffix="One two Three four five six", draw=3, boxes_K4=BOX), 512)
    shown = plain(found.prefix)
    assert shown.startswith(' what is the complete text of " ') and shown.endswith(' "?') and "<mask>" in shown
    assert found.prefix.count("\0") == 2 * shown.count("<mask>") > 0
    assert found.suffix == " one two three four five six" and not found.images and found.boxes_K4 is None
    assert found.weight == 2
    short = made("infill_text", given=4).lay(example(suffix="One two Three four five six", draw=3), 512)
    assert short.suffix == " one two three four", "what is said behind the places of the source could not be known"


def test_options_of_captions():
    assert made("caption", words=3).lay(example(suffix="a b c d e"), 512).suffix == " a b c"
    found = made("caption", punctuation=False, unlearned=2).lay(example(suffix="a cat, a dog. (mat)"), 512)
    assert found.suffix == " a cat a dog mat" and found.unlearned == 2
    tagged = replace(example(**QA), meta={**QA["meta"], "objects": ["Car", "sky", "man"]})
    assert made("question", tags=2).lay(tagged, 512).prefix == " what is it? object: car sky"


def near(count: int, of: int, chance: float) -> bool:
    """Within three standard deviations of the law."""
    return abs(count - of * chance) <= 3 * math.sqrt(of * chance * (1 - chance))


@pytest.mark.check("ofa", 11)
def test_the_law_of_matching():
    """Half of the extra samples are right ones; a wrong one never shows the sample's own picture or caption."""
    laid = made("match")
    right = 0
    for draw in range(4000):
        found = laid.lay(example(suffix="Caption 7", draw=draw), 512)
        shown = found.prefix.removeprefix(' does the image describe " ').removesuffix(' "?')
        assert found.suffix == (" yes" if shown == "caption 7" else " no")
        assert shown != "caption 0", "k0 is the sample itself"
        right += found.suffix == " yes"
    assert near(right, 4000, 0.5)


def test_a_caption_equal_to_the_own_one_is_no_negative():
    laid = made("match")
    for draw in range(400):
        given = example(suffix="caption 7", draw=draw, meta={"captions": ["caption 7", "caption 8"]})
        found = laid.lay(given, 512)
        assert found.suffix == " yes" or not ("caption 7 " in found.prefix or "caption 8 " in found.prefix)
    alone = base.make({"ofa": {"tasks": ["match"]}}, others=lambda number: example(suffix="x"))
    with pytest.raises(BadSample, match="no caption of another picture"):
        [alone.lay(example(suffix="caption 7", draw=draw), 512) for draw in range(20)]


@pytest.mark.check("ofa", 11)
def test_a_grounding_row_gives_itself_or_its_caption_and_never_a_match():
    laid = base.make({"ofa": {"tasks": ["locate", "describe"]}}, others=None)
    kinds = [laid.lay(example(prefix="car", boxes_K4=BOX, draw=draw), 512).prefix.split()[0] for draw in range(4000)]
    assert set(kinds) == {"which", "what"} and near(kinds.count("which"), 4000, 0.5)


def test_swapped_objects(tmp_path):
    (tmp_path / "objects.txt").write_text("cat\ndog\n\ncow\n")
    (tmp_path / "captions.txt").write_text("something else\nanother thing\n")
    files = {"objects": str(tmp_path / "objects.txt"), "captions": str(tmp_path / "captions.txt")}
    laid = base.make({"ofa": {"tasks": ["match"], "negatives": files}}, others=None)
    swapped = wrong = 0
    for draw in range(4000):
        found = laid.lay(example(suffix="a cat on a mat", draw=draw, meta={"objects": ["cat", "moon"]}), 512)
        if found.suffix == " no":
            wrong += 1
            shown = found.prefix.split('"')[1].strip()
            assert shown in ("a dog on a mat", "a cow on a mat", "something else", "another thing")
            swapped += "mat" in shown
    assert near(swapped, wrong, 0.4)


def test_wrong_answers(tmp_path):
    types = {"how many": ["1", "2", "3"], "yes/no": ["yes", "no"], "other": ["red", "blue"]}
    (tmp_path / "types.json").write_text(json.dumps(types))
    options = {"negatives": {"answers": str(tmp_path / "types.json")}}
    laid = made("match_answer", **options)
    found = {"yes": [], "2": []}
    for answer, shown in found.items():
        for draw in range(6000):
            one = laid.lay(example(prefix="Q?", suffix=answer, draw=draw, meta={"answer_scores": {answer: 1.0}}), 512)
            head, tail = ' what is the answer to question " q? ". is " ', ' "?'
            word = one.prefix.removeprefix(head).removesuffix(tail)
            assert len(one.prefix) == len(head + word + tail)
            assert (one.suffix == " yes") == (word == answer)
            shown += [word] if one.suffix == " no" else []
    assert set(found["yes"]) == {"no", "red", "blue"} and near(found["yes"].count("no"), len(found["yes"]), 0.9)
    # a number: u from 1/2 to 0.9 steps by one, u below takes another of the list, u above any other answer
    assert set(found["2"]) == {"1", "3", "red", "blue"}
    assert near(sum(word in ("red", "blue") for word in found["2"]), len(found["2"]), 0.1)
    unsure = [
        laid.lay(example(prefix="q", suffix="yes", draw=d, meta={"answer_scores": {"yes": 0.3}}), 512)
        for d in range(6000)
    ]
    no = [one.prefix for one in unsure if one.suffix == " no"]
    assert near(sum('is " no "' in one for one in no), len(no), 0.2) and unsure[0].weight == 0.3


def test_candidates():
    laid = made("entail", candidates=["Yes", "no", "maybe"], prompt="source")
    found = laid.lay(example(prefix="h", suffix="no"), 512)
    assert found.candidates == (" yes", " no", " maybe") and found.prompt == "source"
    with pytest.raises(BadSample, match="'perhaps' is none of the 3 candidates"):
        laid.lay(example(prefix="h", suffix="perhaps"), 512)
    with pytest.raises(ConfigError, match="caption has no answers to choose from"):
        made("caption", candidates=["a"])


@pytest.mark.parametrize("options, message", [
    ({"tasks": ["caption", "captoin"]}, "tasks"),
    ({"tasks": []}, "tasks"),
    ({"tasks": ["match_answer"]}, "negatives.answers: name a json file"),
    ({"tasks": ["match"], "negatives": {"captions": "none.txt"}}, "none.txt cannot be read"),
    ({"tasks": ["classify"], "candidates": "none.txt"}, "candidates: none.txt cannot be read"),
])  # fmt: skip
def test_mistakes_are_found_when_it_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        base.make({"ofa": options}, others=another)


def test_other_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="only local shards in exact order"):
        base.make({"ofa": {"tasks": ["match"]}}, others=None)
    with pytest.raises(ConfigError, match=r"data\.instruction: .*Did you mean 'ofa'"):
        base.make({"ofaa": {}}, others=None)
    with pytest.raises(ConfigError, match="name one"):
        base.make({"ofa": {}, "vlt5": {}}, others=None)
    assert base.make({}, others=None) is None


@pytest.mark.parametrize("task", sorted({*ofa.Task.__args__} - {"match_answer"}))
def test_an_example_of_another_reader_is_a_reason(task):
    with pytest.raises(BadSample):
        made(task).lay(Example("k", [], draw=1), 512)


@pytest.mark.check("ofa", 4)
@pytest.mark.parametrize("side, divisor", [(512, 512), (480, 512), (64, None)])
def test_bins_round_trip(side, divisor):
    section = bins.Config(divisor=divisor)
    boxes_K4 = np.random.default_rng(0).random((500, 4)).astype(np.float32)
    found_K4 = bins.encode(boxes_K4, side, section)
    again_K4 = bins.decode(found_K4, side, section)
    assert np.abs(again_K4 - boxes_K4).max() * side <= 0.5 * (divisor or side) / 999 + 1e-4
    assert found_K4.min() >= 0 and found_K4.max() <= 999
    assert (bins.encode(again_K4, side, section) == found_K4).all()
    assert bins.encode(BOX, 512, bins.Config()).tolist() == [[250, 500, 749, 999]]


def test_pictures_stay_lazy():
    lazy = Picture(b"never decoded here")
    assert made("caption").lay(replace(example(suffix="a"), images=[lazy]), 512).images == [lazy]

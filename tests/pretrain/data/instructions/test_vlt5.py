"""VL-T5's prefixes as they are printed, and the laws of what is drawn."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pretrain.batch import Example
from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.instructions import base, vlt5
from pretrain.data.symbols import plain

NAMES = [f"thing {n}" for n in range(5)]
BOXES = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0, 0, 1, 1]], dtype=np.float32)
FIVE = BOXES[:1].repeat(5, 0)


def another(number: int) -> Example:
    return Example(
        f"k{number % 20}", [], suffix=f"caption {number % 20}", shard="a.tar", meta={"image_id": number % 10}
    )


def made(task: str, **options) -> base.Instruction:
    return base.make({"vlt5": {"tasks": [task], **options}}, others=another)


def example(**given) -> Example:
    return Example("k0", ["a picture"], shard="a.tar", **given)


QA = {"prefix": "What is it?", "suffix": "cat", "meta": {"answer_scores": {"cat": 0.6, "dog": 0.3}}}
CAR = {"meta": {"names": ["red car"]}, "regions_K4": BOXES}
GOLDENS = [
    ("vqa", QA, "vqa: What is it?", "cat", 0.6),
    ("gqa", QA, "gqa: What is it?", "cat", 1),
    ("visual7w", QA, "visual7w: What is it?", "cat", 1),
    ("caption", {"suffix": "A cat"}, "caption:", "A cat", 1),
    ("nlvr", {"prefix": "Both are red", "suffix": "true"}, "nlvr: Both are red", "true", 1),
    ("vcr_qa", {"suffix": "false", "meta": {"texts": ["Why?", "So."]}},
     "vcr qa question: Why? answer: So.", "false", 1),
    ("vcr_qar", {"suffix": "true", "meta": {"texts": ["Why?", "So.", "For."]}},
     "vcr qar question: Why? answer: So. rationale: For.", "true", 1),
    ("translate", {"prefix": "A cat", "suffix": "Eine Katze"}, "translate English to German: A cat", "Eine Katze", 1),
    ("refer", CAR, "visual grounding: red car", "<vis_extra_id_0>", 1),
    ("ground_caption", CAR, "caption region: <vis_extra_id_0>", "red car", 1),
]  # fmt: skip


@pytest.mark.parametrize("task, given, prefix, suffix, weight", GOLDENS)
def test_goldens(task, given, prefix, suffix, weight):
    found = made(task).lay(example(**given), 224)
    assert (plain(found.prefix), plain(found.suffix), found.weight) == (prefix, suffix, weight)


def test_every_task_has_a_golden_or_a_law():
    assert {task for task, *_ in GOLDENS} | {"lm", "itm", "refcocog"} == set(vlt5.Task.__args__)


def test_options():
    assert made("vqa", soft=False).lay(example(**QA), 224).weight == 1
    found = made("translate", lower=True, languages=["English", "French"]).lay(
        example(prefix="A Cat", suffix="Un Chat"), 1
    )
    assert (found.prefix, found.suffix) == ("translate English to French: a cat", "un chat")


@pytest.mark.check("vl-t5", 8)
@pytest.mark.parametrize("count", [1, 7, 40])
def test_span_prediction_splices_back(count):
    words = [f"w{n}" for n in range(count)]
    for draw in range(20):
        found = made("lm").lay(example(suffix=" ".join(words), draw=draw), 224)
        left = plain(found.prefix).removeprefix("span prediction: ").split()
        said = plain(found.suffix).split("<extra_id_")[1:]
        taken = {f"<extra_id_{part.split('>')[0]}>": part.split(">")[1].split() for part in said}
        assert [word for one in left for word in taken.get(one, [one])] == words
        assert sum(map(len, taken.values())) == max(int(0.15 * count), 1)
        whole = made("lm", noise="bart").lay(example(suffix=" ".join(words), draw=draw), 224)
        assert whole.suffix == " ".join(words) and plain(whole.prefix).startswith("denoise text: ")
        gone = [word for word in plain(whole.prefix).split()[2:] if word != "<mask>"]
        assert len(gone) == count - max(int(0.3 * count), 1)


def near(count: int, of: int, chance: float) -> bool:
    return abs(count - of * chance) <= 3 * math.sqrt(of * chance * (1 - chance))


@pytest.mark.check("vl-t5", 9)
def test_a_negative_is_of_another_picture_half_of_the_time():
    laid = made("itm", negatives={"image": "json:image_id"})
    right = 0
    for draw in range(4000):
        found = laid.lay(example(suffix="caption 3", draw=draw, meta={"image_id": 3}), 224)
        shown = found.prefix.removeprefix("image text match: ")
        assert found.suffix == ("true" if shown == "caption 3" else "false")
        assert found.suffix == "true" or int(shown.split()[1]) % 10 != 3, "captions 3 and 13 are of picture 3"
        right += found.suffix == "true"
    assert near(right, 4000, 0.5)


def test_regions_are_drawn_evenly_and_not_sorted():
    counts, orders = np.zeros(5), set()
    for draw in range(3000):
        one = made("refer").lay(example(draw=draw, meta={"names": NAMES}, regions_K4=FIVE), 224)
        assert plain(one.prefix).removeprefix("visual grounding: thing ") == plain(one.suffix)[14:-1]
        counts[int(plain(one.suffix)[14:-1])] += 1
    assert all(near(int(count), 3000, 0.2) for count in counts)
    for draw in range(50):
        several = made("refer", ground=3).lay(example(draw=draw, meta={"names": NAMES}, regions_K4=FIVE), 224)
        mirror = made("ground_caption", ground=3).lay(example(draw=draw, meta={"names": NAMES}, regions_K4=FIVE), 224)
        numbers = [int(part) for part in plain(several.suffix).replace("<vis_extra_id_", " ").replace(">", " ").split()]
        text = " ".join(f"<extra_id_{n}> thing {i}" for n, i in enumerate(numbers))
        assert plain(several.prefix) == f"visual grounding: {text}"
        assert plain(mirror.prefix) == f"caption region: {plain(several.suffix)}" and plain(mirror.suffix) == text
        orders.add(tuple(numbers))
    assert any(order != tuple(sorted(order)) for order in orders)


def test_only_regions_that_the_model_sees_are_named():
    for draw in range(50):
        found = made("refer").lay(example(draw=draw, meta={"names": NAMES}, regions_K4=BOXES[:2]), 224)
        assert plain(found.suffix) in ("<vis_extra_id_0>", "<vis_extra_id_1>")


def test_a_grid_names_the_cell_that_an_object_covers():
    """Of a model that sees cells: the object's place in the json says nothing; one too small for its cell is left."""
    boxes = np.array([[0.5, 0.5, 1, 1], [0.1, 0.1, 0.2, 0.2], [0, 0.5, 0.5, 1]], dtype=np.float32)
    given = {"meta": {"names": ["car", "ant", "dog"]}, "boxes_K4": boxes}
    for task, side in (("refer", "suffix"), ("ground_caption", "prefix")):
        found = [made(task, grid=[2, 2]).lay(example(draw=draw, **given), 224) for draw in range(60)]
        pairs = set()
        for one in found:
            name = one.prefix.split()[-1] if task == "refer" else one.suffix
            pairs.add((name, plain(getattr(one, side)).split()[-1]))
        assert pairs == {("car", "<vis_extra_id_3>"), ("dog", "<vis_extra_id_2>")}
        with pytest.raises(BadSample, match="an object that covers half a cell"):
            made(task, grid=[2, 2]).lay(example(meta={"names": ["ant"]}, boxes_K4=boxes[1:2]), 224)
        with pytest.raises(BadSample, match=r"regions \(data\.regions, or grid\)"):
            made(task).lay(example(**given), 224)


def test_an_answer_about_a_picture_needs_one():
    blind = replace(example(suffix="true", meta={"texts": ["Why?", "So."]}), images=[])
    with pytest.raises(BadSample, match=r"vcr_qa asks about a picture, and none is shown: set data\.reader's image"):
        made("vcr_qa").lay(blind, 224)
    assert made("vcr_qa").lay(replace(blind, regions_K4=BOXES), 224).suffix == "true"


def test_refcocog_draws_a_region_by_its_overlap():
    truth = np.array([[0, 0, 0.5, 0.5]], dtype=np.float32)  # overlaps 1, 0.9, 0 and 0.25
    laid = made("refcocog")
    found = [laid.lay(example(prefix="it", boxes_K4=truth, regions_K4=BOXES, draw=d), 224) for d in range(3000)]
    assert {plain(one.suffix) for one in found} == {"<vis_extra_id_0>", "<vis_extra_id_1>"}
    assert near(sum("_0>" in plain(one.suffix) for one in found), 3000, 1 / 1.9)
    assert found[0].prefix == "visual grounding: it" and found[0].weight == 1
    far = laid.lay(example(prefix="it", boxes_K4=truth, regions_K4=BOXES[2:3]), 224)
    assert far.weight == 0, "nothing that is seen is meant: no loss"
    cells = made("refcocog", grid=[2, 2])
    found = {plain(cells.lay(example(prefix="it", boxes_K4=truth, draw=d), 224).suffix) for d in range(20)}
    assert found == {"<vis_extra_id_0>"}


def test_mistakes():
    with pytest.raises(ConfigError, match="11 x 11 cells"):
        made("refcocog", grid=[11, 11])
    with pytest.raises(ConfigError, match="only local shards"):
        base.make({"vlt5": {"tasks": ["itm"]}}, others=None)
    assert made("lm").symbols() == ("<extra_id_99>",) and made("lm", noise="bart").symbols() == ("<mask>",)
    assert made("refer").symbols() == ("<vis_extra_id_99>",) and made("caption").symbols() == ()
    assert made("refer", ground=2).symbols() == ("<extra_id_99>", "<vis_extra_id_99>")


@pytest.mark.parametrize("task", sorted(set(vlt5.Task.__args__) - {"translate"}))
def test_an_example_of_another_reader_is_a_reason(task):
    with pytest.raises(BadSample):
        made(task).lay(Example("k", [], draw=1), 224)

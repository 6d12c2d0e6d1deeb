"""Rows of encoder-decoders: goldens of what is read, said and counted, for each kind of opening."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain import recipe
from pretrain.batch import Example
from pretrain.config import ConfigError
from pretrain.data import tokenizer as tok
from pretrain.data.compose import IGNORE, Composer
from pretrain.data.decode import BadSample
from pretrain.data.seq2seq import Seq2SeqComposer
from pretrain.data.symbols import symbol
from pretrain.models import base, ofa
from tests import tiny
from tests.pretrain.models import tiny_vlt5

NAMES = tuple(f"<code_{n}>" for n in range(8))


@pytest.fixture(scope="module")
def words() -> tok.Tokenizer:
    return tok.train(["what is it", "a cat", "red dog"], 560).extended(NAMES)


def composer(words, *, opening=None, length=8, written=6, **keys) -> Seq2SeqComposer:
    return Seq2SeqComposer(words, context_length=length, written=written, opening=opening or (words.start,), **keys)


def test_golden(words):
    what, cat = words.ids("what is it"), words.ids("a cat")
    row = composer(words, length=16, written=16).row(Example("k", [], prefix="what is it", suffix="a cat"), [])
    assert row.ids == [words.start, *what, words.end] and row.blocks == [0] * len(row.ids)
    assert row.decoder == [words.start, *cat] and row.decoder_labels == [*cat, words.end]
    assert set(row.labels) == {IGNORE}


def test_an_opening_of_two_tokens_says_its_second(words):
    """VL-BART: the decoder starts from </s>, writes <s>, and then the label at step 1."""
    cat = words.ids("cat")
    row = composer(words, opening=(words.end, words.start)).row(Example("k", [], suffix="cat"), [])
    assert row.decoder == [words.end, words.start, *cat]
    assert row.decoder_labels == [words.start, *cat, words.end]


def test_cut_texts_keep_their_end_and_fill_no_more_places(words):
    for opening in ((words.start,), (words.end, words.start)):
        row = composer(words, opening=opening).row(Example("k", [], prefix="a cat " * 9, suffix="red dog " * 9), [])
        assert len(row.ids) == 8 and row.ids[-1] == words.end
        assert len(row.decoder) == len(row.decoder_labels) == 6
        assert row.decoder_labels[-1] == words.end and row.decoder[1:] == row.decoder_labels[:-1]


@pytest.mark.parametrize(
    ("model", "most", "advice"),
    [
        (ofa.Config(), 1, "paste them side by side into one"),
        (tiny_vlt5.section(source="patch"), 1, r"set model\.vision\.images=2, or take a data\.reader"),
        (tiny_vlt5.section(source="patch", images=2), 2, r"take a data\.reader that gives fewer"),
        (tiny_vlt5.section(), None, ""),
    ],
    ids=["ofa", "cells", "cells of two", "regions"],
)
def test_more_pictures_than_places_are_a_reason(words, model, most, advice):
    """Without it a row of two beside a row of none would pass for two rows of one."""
    made = Seq2SeqComposer(words, context_length=8, written=6, opening=(words.start,), pictures=model.pictures)
    picture_HWC = np.zeros((4, 4, 3), dtype=np.uint8)
    given = Example("k", [], prefix="what", suffix="a cat")
    for count in range(1, 4):
        if most is None or count <= most:
            assert len(made.row(given, [picture_HWC] * count).images) == count
            continue
        with pytest.raises(BadSample, match=f"{count} pictures, the model reads {most} of a sample; {advice}"):
            made.row(given, [picture_HWC] * count)


def test_tokens_without_loss(words):
    whole = composer(words, written=16).row(Example("k", [], suffix="a cat"), [])
    row = composer(words, written=16).row(Example("k", [], suffix="a cat", unlearned=2), [])
    assert row.decoder == whole.decoder
    assert row.decoder_labels == [IGNORE, IGNORE, *whole.decoder_labels[2:]]
    short = composer(words).row(Example("k", [], suffix="", unlearned=2), [])
    assert short.decoder_labels == [IGNORE]


def test_codes_fit_or_are_refused(words):
    text = " ".join(symbol(name) for name in NAMES)
    row = composer(words, written=9).row(Example("k", [], suffix=text, codes=True), [])
    assert row.decoder_labels == [*(words.symbol(name) for name in NAMES), words.end] and row.codes
    with pytest.raises(BadSample, match="8 image codes are more than the 7"):
        composer(words, written=8).row(Example("k", [], suffix=text, codes=True), [])


def test_batch(words):
    make = composer(words)
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    rows = [
        make.row(Example("a", [], prefix="what is it", suffix="cat", weight=0.5), []),
        make.row(Example("b", [], prefix="it", suffix=symbol("<code_3>"), codes=True, hole=True), [image]),
        make.row(Example("c", [], prefix="it", suffix="a red cat"), [image, image]),
    ]
    batch = make.collate(rows)
    assert batch.weight_B.tolist() == [0.5, 1, 1] and batch.codes_B.tolist() == [False, True, False]
    assert batch.owner_N.tolist() == [1, 2, 2] and batch.hole_N.tolist() == [True, False, False]
    places = max(len(row.decoder) for row in rows)
    assert batch.decoder_tokens_BU.shape == batch.decoder_labels_BU.shape == (3, places)
    assert batch.decoder_tokens_BU[0].tolist() == [*rows[0].decoder, *[words.pad] * (places - len(rows[0].decoder))]
    assert batch.decoder_labels_BU[0, len(rows[0].decoder) :].eq(IGNORE).all()
    first, second = batch.split(2)
    assert first.hole_N.tolist() == [True] and second.hole_N.tolist() == [False, False]
    assert torch.equal(second.decoder_labels_BU, batch.decoder_labels_BU[2:])
    assert make.collate(rows[:1]).hole_N is None and make.collate(rows[:1]).image_NCHW is None


@pytest.mark.parametrize("kind", ["source", "source_end"])
def test_a_decoder_may_read_the_source_first(words, kind):
    """OFA's prompts: the decoder reads the source, with or without its end, and learns the answer alone."""
    what, cat = words.ids("what is it"), words.ids("cat")
    example = Example("k", [], prefix="what is it", suffix="cat", prompt=kind)
    row = composer(words, length=16, written=20).row(example, [])
    end = [words.end] if kind == "source_end" else []
    assert row.decoder == [words.start, *what, *end, *cat]
    assert row.decoder_labels == [*[IGNORE] * len([*what, *end]), *cat, words.end]
    with pytest.raises(BadSample, match="leaves none of its 5 places"):
        composer(words, length=16, written=5).row(replace(example, prefix="what is it " * 3), [])


@pytest.mark.check("ofa", 5)
def test_candidates_allow_their_next_tokens_at_each_place(words):
    given = ("cat", "red dog", "red cat")
    make = composer(words, written=16)
    rows = [make.row(Example(str(n), [], suffix=text, candidates=given), []) for n, text in enumerate(given)]
    plain = make.row(Example("p", [], suffix="a cat"), [])
    told = replace(Example("t", [], prefix="it", suffix="cat", candidates=given), prompt="source")
    batch = make.collate([*rows, plain, make.row(told, [])])
    sequences = [[*words.ids(text), words.end] for text in given]
    for row, text in [*enumerate(given), (4, "cat")]:
        labels = batch.decoder_labels_BU[row].tolist()
        first = next(place for place, token in enumerate(labels) if token >= 0)
        said = [token for token in labels if token >= 0]
        assert said == [*words.ids(text), words.end]
        for place, token in enumerate(labels):
            found = batch.allowed_SV[batch.allowed_BU[row, place]].nonzero()[:, 0].tolist()
            if token < 0:
                assert len(found) == words.vocab_size, "what is not learned is not bound"
                continue
            before = said[: place - first]
            wanted = {one[len(before)] for one in sequences if one[: len(before)] == before and len(one) > len(before)}
            assert set(found) == wanted
    assert batch.allowed_BU[3].eq(0).all() and batch.allowed_SV.shape[1] == words.vocab_size
    first, second = batch.split(2)[:2]
    assert torch.equal(second.allowed_BU, batch.allowed_BU[2:4]) and torch.equal(first.allowed_SV, batch.allowed_SV)
    with pytest.raises(BadSample, match="longer than the model's decoder writes"):
        composer(words, written=2).row(Example("k", [], suffix="red dog", candidates=given), [])


@pytest.mark.check("ofa", 5)
def test_a_picture_written_of_a_text_is_told_from_codes_and_specials_alone(words):
    codes = " ".join(symbol(name) for name in NAMES[:3])
    example = Example("k", [], prefix="a cat", suffix=codes, codes=True, codes_alone=True)
    make = composer(words, written=9)
    text, prompted = Example("t", [], suffix="cat"), replace(example, prompt="source")
    batch = make.collate([make.row(one, []) for one in (example, text, prompted, replace(example, codes_alone=False))])
    learned_BU = batch.decoder_labels_BU != IGNORE
    assert learned_BU.sum(1).tolist() == [4, len(words.ids("cat")) + 1, 4, 4], "three codes and the end"
    assert torch.equal(batch.allowed_BU[[0, 2]], learned_BU[[0, 2]].long()) and not batch.allowed_BU[[1, 3]].any()
    wanted = {words.start, words.pad, words.end, *(words.symbol(name) for name in NAMES)}
    assert set(batch.allowed_SV[1].nonzero()[:, 0].tolist()) == wanted and len(batch.allowed_SV) == 2


def test_regions_go_with_their_rows(words):
    make, box = composer(words), np.array([[0, 0, 1, 1]], dtype=np.float32)
    three = {"regions_K4": box.repeat(3, 0) / 2, "region_KC": np.ones((3, 5), np.float32)}
    seen = Example("a", [], suffix="cat", boxes_K4=box, **three)
    batch = make.collate([make.row(seen, []), make.row(Example("b", [], suffix="cat"), [])])
    assert batch.region_KC.shape == (3, 5) and batch.box_owner_K.tolist() == [0, 0, 0]
    assert batch.boxes_K4.max() == 0.5, "what the model is shown are the regions"


def test_a_model_that_sees_regions_alone_is_shown_no_picture_without(words):
    make, box = composer(words, regions=True), np.array([[0, 0, 1, 1]], dtype=np.float32)
    picture = np.zeros((2, 2, 3), np.uint8)
    for blind in ({}, {"boxes_K4": box}, {"regions_K4": box}):
        with pytest.raises(BadSample, match="a picture without features of its regions"):
            make.row(Example("a", [picture], suffix="cat", **blind), [picture])
    make.row(Example("a", [picture], suffix="cat", regions_K4=box, region_KC=np.ones((1, 5), np.float32)), [picture])
    make.row(Example("b", [], suffix="cat"), [])


def test_codes_that_the_model_has_not_are_not_spelled(words):
    known = next(name for name in NAMES if name.startswith("<code_"))
    suffix = " ".join(symbol(name) for name in (known, "<code_7777>"))
    with pytest.raises(BadSample, match="<code_7777> is no code of the model: its codebook has fewer"):
        composer(words).row(Example("a", [], suffix=suffix, codes=True), [])


def test_codes_of_another_raster_are_not_written_into_the_models(words):
    """Nine codes in rows of two would each but the first two stand at another place of the picture."""
    four, nine = (" ".join(symbol(NAMES[n % 8]) for n in range(count)) for count in (4, 9))
    make = composer(words, written=16, picture_codes=ofa.Config(code_image_size=16).picture_codes)
    assert len(make.row(Example("a", [], suffix=four, codes=True), []).decoder) == 5
    with pytest.raises(BadSample, match=r"9 image codes, the model writes 4 of a picture \(model\.code_image_size\)"):
        make.row(Example("a", [], suffix=nine, codes=True), [])


def test_a_decoder_without_room_is_refused(words):
    with pytest.raises(ConfigError, match="2 places has no room"):
        composer(words, opening=(words.end, words.start), written=2)


class Reading(base.Config):
    """A model section with a decoder."""

    written: int | None = 6

    @property
    def lengths(self):
        return 8, self.written

    @property
    def symbols(self):
        return NAMES


def test_the_recipe_builds_what_the_model_asks_for(tmp_path):
    folder = tiny.corpus(tmp_path)
    section = Reading(name="reading", tokenizer=f"{folder}/tokenizer")
    words = recipe.build_tokenizer(section)
    assert words.symbol("<code_7>") == words.vocab_size - 1
    made = recipe.build_composer(section, words)
    assert isinstance(made, Seq2SeqComposer) and made.opening == (words.start,) and made.written == 6
    assert type(recipe.build_composer(Reading(name="reading", written=None), words)) is Composer

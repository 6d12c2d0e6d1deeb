"""Pairs, texts, images and objects in one run: two mini-batches a step, the same for any number of ranks."""

import pytest
import torch

from pretrain.batch import Batch
from pretrain.config import ConfigError, build
from pretrain.data import synthetic, tokenizer
from pretrain.data.blend import Blend, Parts, sizes_of
from pretrain.data.compose import Composer
from pretrain.data.loader import Config, Loader
from pretrain.data.order import Order
from pretrain.data.seq2seq import Seq2SeqComposer
from pretrain.data.transforms import Transform

SYMBOLS = ("<mask>", *(f"<code_{n}>" for n in range(8)), *(f"<bin_{n}>" for n in range(20)))
BASE = tokenizer.train([f"a picture of one {name} on a plain ground" for name in synthetic.CLASSES], 600)
WORDS = BASE.extended(SYMBOLS)
ROWS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    synthetic.write(folder, shards=2, samples=24, size=16)
    return f"{folder}/shapes-{{00000..00001}}.tar"


def blend(shards: str, **second) -> list[dict]:
    """Return OFA's mixture in small: pairs in the first mini-batch; texts, images and objects in the second."""
    bins = {"boxes": {"bins": 20, "divisor": None}}
    return [
        {"name": "pairs", "shards": shards, "weight": 2, "instruction": {"ofa": {"tasks": ["caption", "match"]}}},
        {"name": "texts", "shards": shards, "weight": 0.5, "part": 1, "reader": {"text": {}},
         "instruction": {"ofa": {"tasks": ["infill_text"]}}, **second},
        {"name": "images", "shards": shards, "weight": 0.25, "part": 1, "reader": {"codes": {}}, "augment": {},
         "instruction": {"ofa": {"tasks": ["infill_image"]}}, **second},
        {"name": "objects", "shards": shards, "weight": 0.25, "part": 1, "reader": {"detection": {"objects": None}},
         "instruction": {"ofa": {"tasks": ["detect"], **bins}}, **second},
    ]  # fmt: skip


def loader(shards: str, *, rank: int = 0, world: int = 1, workers: int = 0, composer=None, **options) -> Loader:
    section = build(Config, {"blend": blend(shards), "lanes": 8, "workers": workers, **options}, where="data")
    composer = composer or Seq2SeqComposer(WORDS, context_length=32, written=24, opening=(WORDS.start,))
    return Loader(section, batch_size=ROWS, seed=5, transform=Transform(16), composer=composer, rank=rank, world=world)


def first(made: Loader, count: int, start: int = 0) -> list[Batch]:
    batches = made.iterate(start)
    return [next(batches) for _ in range(count)]


def rows(batch: Batch) -> list[tuple]:
    """Return what is told and said of each row, padding left out."""
    source = [ids[seen].tolist() for ids, seen in zip(batch.tokens_BT, batch.valid_BT)]
    said = [line[line >= 0].tolist() for line in batch.decoder_labels_BU]
    return list(zip(batch.source_B.tolist(), batch.keys, source, said, batch.weight_B.tolist(), batch.codes_B.tolist()))


def test_two_mini_batches_of_the_shares_of_their_weights(shards):
    one, *_ = first(loader(shards), 1)
    second = one.beside
    assert (len(one), one.part, len(second), second.part) == (8, 0, 4, 1) and second.beside is None
    assert set(one.source_B.tolist()) == {0} and set(second.source_B.tolist()) <= {1, 2, 3}
    assert len(one.image_NCHW) == 8 and one.codes_B.sum() == 0 and one.hole_N is None
    images = sum(source != 1 for source in second.source_B.tolist())
    assert (0 if second.image_NCHW is None else len(second.image_NCHW)) == images
    assert second.codes_B.tolist() == [source == 2 for source in second.source_B.tolist()]
    assert set(second.weight_B.tolist()) == {2.0} and set(one.weight_B.tolist()) == {1.0}


def test_long_run_shares_and_what_is_hidden(shards):
    counts = [0] * 4
    for batch in first(loader(shards), 300):
        for mini in batch.minis():
            for source in mini.source_B.tolist():
                counts[source] += 1
            if mini.hole_N is not None:
                seen = mini.source_B[mini.owner_N]
                assert torch.equal(mini.hole_N, seen == 2)
    assert counts[0] == 2400 and sum(counts) == 3600
    assert abs(counts[1] - 600) < 75 and abs(counts[2] - 300) < 60, counts


@pytest.mark.check("vl-t5", 11)
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_trains_on_the_same_rows(shards, world):
    whole = first(loader(shards), 6)
    ranks = [first(loader(shards, rank=rank, world=world, workers=rank % 2), 6) for rank in range(world)]
    for step, batch in enumerate(whole):
        for number, mini in enumerate(batch.minis()):
            together = [row for rank in ranks for row in rows(rank[step].minis()[number])]
            assert together == rows(mini)


@pytest.mark.check("vl-t5", 11)
def test_single_task_batches_come_in_one_order_for_all_ranks(shards):
    """`blend_by: batch`: the task of a step is a function of (seed, step), shuffled anew in each block of steps."""
    parts = [{**one, "part": 0} for one in blend(shards)]
    made = [loader(shards, rank=rank, world=2, blend=parts, blend_by="batch") for rank in range(2)]
    orders = []
    for one in made:
        spans = [one.order.spans(step) for step in range(200)]
        orders.append([next(n for n, (a, b) in enumerate(span) if b > a) for span in spans])
    assert orders[0] == orders[1] and orders[0][:100] != orders[0][100:]
    assert sorted(orders[0][:100]) == sorted(orders[0][100:])


def test_resume_is_the_same_run(shards):
    made = loader(shards)
    whole = first(made, 8)
    again = loader(shards)
    again.restore(made.state(5))
    assert [rows(b) + rows(b.beside) for b in first(again, 3, 5)] == [rows(b) + rows(b.beside) for b in whole[5:]]
    tree = made.fingerprint()
    assert tree["blend"]["parts"] == [0, 1, 1, 1] and tree["batch_size"] == ROWS


def test_texts_change_with_the_epoch_and_nothing_else(shards):
    """A sample is told in another way in each epoch, and in the same way whenever it is that epoch."""
    found: dict[tuple, set] = {}
    for batch in first(loader(shards), 60):
        for mini in batch.minis():
            for source, key, told, said, *_ in rows(mini):
                found.setdefault((source, key), set()).add((tuple(told), tuple(said)))
    assert sum(len(ways) > 1 for (source, _), ways in found.items() if source == 1) > 20


def test_sizes_of_mini_batches():
    assert sizes_of([2, 1], 24, 4) == [16, 8]
    assert sizes_of([0.1, 0.2], 9, 3) == [3, 6]
    with pytest.raises(ConfigError, match=r"8\.33333 of its 25 rows; their weights and 2 ranks want a multiple of 6"):
        sizes_of([2, 1], 25, 2)


def test_pictures_of_the_second_mini_batch_may_have_a_size_of_their_own(shards):
    batch = first(loader(shards, blend=blend(shards, image_size=8)), 3)[2]
    assert batch.image_NCHW.shape[2:] == (16, 16) and batch.beside.image_NCHW.shape[2:] == (8, 8)


@pytest.mark.parametrize("change, message", [
    ({"part": 1}, "give some source part: 0"),
    ({"image_size": 8}, "image_size: pictures of part 0 go into one batch"),
])  # fmt: skip
def test_contradictions_are_refused(shards, change, message):
    tree = [
        {"shards": shards, "weight": 1, "name": str(n), **(change if n or "part" in change else {})} for n in range(2)
    ]
    with pytest.raises(ConfigError, match=message):
        build(Config, {"blend": tree}, where="data")


def test_symbols_that_the_model_has_not_are_refused(shards):
    bare = Seq2SeqComposer(BASE, context_length=32, written=24, opening=(BASE.start,))
    with pytest.raises(ConfigError, match="of source 'texts': it lays <mask>, which the model's vocabulary has not"):
        loader(shards, composer=bare)
    assert isinstance(bare, Composer)


def test_moving_pictures_with_codes_is_refused(shards):
    parts = blend(shards)
    parts[2]["augment"] = {"flip": 0.5}
    with pytest.raises(ConfigError, match="move the pictures away from the codes"):
        loader(shards, blend=parts)


def test_neighbours_are_of_the_same_source():
    """Sources of the second mini-batch are counted on from the first's."""
    orders = [Order([10], batch_size=4, lanes=1, seed=n, source=n) for n in range(3)]
    made = Parts([Blend(orders[:1], [1], seed=0), Blend(orders[1:], [1, 1], seed=1)])
    for place in made.rows(3):
        assert next(iter(made.neighbours(place))).source == place.source
    assert len(made.local(0, 1, 2)) == 4 and made.samples == 30


def test_a_negative_caption_is_of_the_same_data_set(shards):
    """Matching draws from the shards themselves; what is shown is a caption of another sample."""
    only = [{"shards": shards, "weight": 1, "instruction": {"ofa": {"tasks": ["match"]}}}]
    made = first(loader(shards, blend=only), 10)
    yes, no = WORDS.ids(" yes"), WORDS.ids(" no")
    answers = [line[line >= 0].tolist()[:-1] for batch in made for line in batch.decoder_labels_BU]
    assert all(answer in (yes, no) for answer in answers) and 30 < answers.count(yes) < 90

"""Every task template is learned by heart: each model is trained on all of its own at once, by the real launcher on two
ranks, and then writes what each of 32 samples says, token by token and without a mistake.

Masks, regions and negatives are drawn anew every epoch: what is asked at the end are the draws of another one.
"""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import dist, pretrained, recipe
from pretrain.batch import Batch
from pretrain.data import loader, sources, symbols
from pretrain.data.asked import GIVEN, SAID, Asked
from pretrain.data.order import Place
from pretrain.evals.base import Features
from pretrain.losses.tokens import IGNORE
from pretrain.models import convert_ofa, convert_vlt5
from pretrain.models.constraints import Answers, Exactly
from pretrain.models.writing import Options
from pretrain.objectives import base, masked_lm
from tests.end_to_end import quilts, templates
from tests.end_to_end.launched import launch
from tests.end_to_end.templates import LEARNERS, Learner, Template

EPOCH = 10_000  #: whose draws are asked: no run here comes so far


@pytest.mark.parametrize("paper", ["ofa", "vlt5"])
def test_every_task_has_a_template(paper: str) -> None:
    tasks = importlib.import_module(f"pretrain.data.instructions.{paper}").Task.__args__
    for learner in LEARNERS.values():
        assert learner.paper != paper or {one.task for one in learner.templates} == set(tasks)


@pytest.mark.slow
@pytest.mark.check("univl", 13)
@pytest.mark.parametrize("name", LEARNERS)
def test_every_template_is_written_as_it_was_learned(name: str, tmp_path: Path) -> None:
    learner = LEARNERS[name]
    started = launch(prepare(tmp_path, name))
    output = started.communicate(timeout=600)[0]
    assert started.returncode == 0, output
    found = pretrained.load(tmp_path / "runs" / name)
    wrong = {one.task: mistakes(found, learner.source(tmp_path, one), one) for one in learner.templates}
    assert not {task: (len(rows), rows[:3]) for task, rows in wrong.items() if rows}
    if "masked_lm" in learner.objectives:
        batch = only(found, learner.source(tmp_path, learner.templates[0]))
        assert_filled_in(found.model, batch)


def prepare(folder: Path, name: str) -> Path:
    """Write all that a run reads, and return its config."""
    learner = LEARNERS[name]
    quilts.write(folder)
    quilts.write_tokenizer(folder / "tokenizer", every_text(folder, learner))
    if learner.start:
        write_start(folder, learner)
    return learner.write_config(folder, name)


def write_start(folder: Path, learner: Learner) -> None:
    """Write first weights as OFA and VL-BART are released, five times as large as they are drawn.

    N(0, 0.02) is for widths of hundreds: at 64 all attention is even and all logits are equal for a hundred steps.
    """
    section = recipe.model_section(learner.section(folder), where="model")
    dist.seed_step(1, "start")
    state = recipe.build_model(section, recipe.build_tokenizer(section)).state_dict()
    wide = {
        name: 5 * value if value.ndim == 2 and "rel_pos_table" not in name else value for name, value in state.items()
    }
    ofa = section.name == "ofa"
    release = convert_ofa.to_fairseq(wide) if ofa else convert_vlt5.weights_to(section.text, wide, seen=True)
    torch.save(release, folder / templates.START)


def every_text(folder: Path, learner: Learner) -> Iterator[str]:
    """Yield what is given, said and chosen from in samples of some epochs, without symbols."""
    yield from templates.COLOURS
    for one in learner.templates:
        yield " ".join(one.words)
        read = opened(learner.source(folder, one))
        for epoch, index in itertools.product(range(4), range(quilts.COUNT)):
            found = read.example(read.store.read(Place(epoch, index, 0, index)), quilts.SIZE)
            texts = symbols.pieces(found.prefix) + symbols.pieces(found.suffix)
            yield from (piece for piece, laid in texts if not laid)


def beside(entry: dict[str, Any]) -> sources.Beside:
    return sources.Beside(**{key: entry[key] for key in ("instruction", "regions") if key in entry})


def opened(entry: dict[str, Any]) -> sources.Source:
    return sources.one(entry["shards"], entry["reader"], seed=0, beside=beside(entry))


def only(found: pretrained.Pretrained, entry: dict[str, Any], *, asked: bool = False) -> Batch:
    """Return all samples of a template as one batch, with the draws of an epoch that no run has seen."""
    composer = Asked(found.composer) if asked else found.composer
    [batch] = loader.scan(
        entry["shards"],
        reader=entry["reader"],
        transform=found.transform,
        composer=composer,
        batch_size=quilts.COUNT,
        epoch=EPOCH,
        beside=beside(entry),
    )
    assert len(batch) == quilts.COUNT and not batch.bad and not batch.filler
    return batch


def mistakes(found: pretrained.Pretrained, entry: dict[str, Any], one: Template) -> list[tuple[str, str, str]]:
    """Return (given, said, written) of each sample that is not written exactly, its end included."""
    if one.by == "match":
        return mismatched(found.model, only(found, entry))
    batch, words = only(found, entry, asked=True), found.tokenizer
    features = Features(lambda batch, want: want(found.model, batch), found.transform, found.composer)
    said = [words.ids(meta[SAID]) for meta in batch.meta]
    unknown = words.symbol("<unk>")
    assert not any(unknown in row for row in said) and not (batch.tokens_BT == unknown).any(), "a word is missing"
    listed = [words.ids(word) for word in one.words]
    if one.by == "rank":
        rule = Answers(listed, end=words.end)
        wrote = [listed[n] for n in features.rank(batch, listed, constraint=rule).argmax(1).tolist()]
    else:
        options, rule = Options(beams=3 if one.by == "beam" else 1, max_tokens=12), None
        if one.by == "trie":
            rule = Answers(listed, end=words.end)
        elif one.symbols:
            count = {"bin": templates.BINS, "code": templates.CODES}[one.by]
            rule = Exactly(words.symbol(f"<{one.by}_0>"), count, tokens=one.symbols, end=words.end)
        wrote = [kept[0].tokens for kept in features.write(batch, options, constraint=rule)]
    rows = zip(batch.meta, said, wrote, strict=True)
    return [(meta[GIVEN], words.decode(right), words.decode(mine)) for meta, right, mine in rows if right != mine]


@torch.no_grad()
def mismatched(model: Any, batch: Batch) -> list[tuple[str, str, str]]:
    """Return (picture, text, what the model says) of all pairs of the batch that it does not tell right."""
    encodings, wrong = model(batch), []
    for row, key in enumerate(batch.keys):
        states_BTC = encodings.fuse(
            batch.tokens_BT,
            torch.zeros_like(batch.tokens_BT),
            encodings.own_B[row].expand(len(batch)),
            batch.valid_BT,
            text_B=torch.arange(len(batch)),
        )
        says = encodings.match_logits(states_BTC).argmax(1).tolist()
        wrong += [(key, text, str(one)) for text, one in zip(batch.keys, says) if one != (text == key)]
    return wrong


@torch.no_grad()
def assert_filled_in(model: Any, batch: Batch) -> None:
    """Every word that is hidden is found, over four draws."""
    objective = base.build({"masked_lm": masked_lm.Config()}, model).objectives["masked_lm"]
    for draw in range(4):
        batch.draw_B = torch.arange(len(batch)) * 31 + 1009 * draw
        cloze = objective.prepare(batch, 0).draws
        states_BTC = model(batch).fuse(cloze["tokens_BT"], torch.zeros_like(batch.tokens_BT), valid_BT=batch.valid_BT)
        hidden_BT = cloze["labels_BT"] != IGNORE
        said = model.lm_logits(states_BTC).argmax(-1)[hidden_BT]
        assert hidden_BT.any() and torch.equal(said, cloze["labels_BT"][hidden_BT])

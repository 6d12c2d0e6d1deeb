"""Retrieval scores what a search by hand finds, on one rank and two, and trains with the loss of pretraining."""

from pathlib import Path

import pytest
import torch

from finetune.contrast import Contrast
from finetune.methods import base as methods
from finetune.tasks import retrieval
from pretrain import dist, pretrained
from pretrain.data import loader
from pretrain.evals.base import Features
from pretrain.losses.contrastive import contrastive
from pretrain.objectives import base as objectives
from tests import tiny
from tests.finetune.test_pairs import folder


def task(data: Path, **keys) -> retrieval.Task:
    return retrieval.Task(retrieval.Config(name="retrieval", data=str(data), batch_size=4, k=[1, 3], **keys))


def found(model: str, data: Path, where: Path) -> dict:
    """Return the scores of a base on this rank."""
    loaded, made = pretrained.load(model), task(data)
    batches = loader.scan(
        made.prepare(where).test, reader={made.reader: made.options}, transform=loaded.transform,
        composer=loaded.composer, batch_size=4, rank=dist.rank(), world=dist.world(),
    )  # fmt: skip
    features = Features(lambda b, want: getattr(loaded.model(b), want), loaded.transform, loaded.composer)
    return made.scores(features, batches, [])


@pytest.fixture
def data(tmp_path) -> Path:
    """Eleven test pictures of two captions, one caption common to two of them."""
    mine = tmp_path / "mine"
    folder(mine / "train", 4)
    folder(mine / "test", 11)
    (mine / "test" / "1" / "1.txt").write_text("picture 1\npicture 2\n")
    return mine


@torch.no_grad()
def test_scores_are_those_of_a_search_by_hand(data, tmp_path, ranks):
    model = tiny.export(tmp_path / "export")
    one = found(str(model), data, tmp_path / "run")
    assert list(one) == ["text_to_image/R@1", "text_to_image/R@3", "image_to_text/R@1", "image_to_text/R@3"]
    loaded = pretrained.load(model)
    splits = task(data).prepare(tmp_path / "run")
    assert splits.samples == {"train": 4, "validation": 0, "test": 11} and splits.names == []
    [batch] = loader.scan(
        splits.test, reader={"caption": {"keep_all": True}}, transform=loaded.transform, composer=loaded.composer,
        batch_size=11,
    )  # fmt: skip
    image_NE, captions = loaded.model(batch).image, [meta["captions"] for meta in batch.meta]
    features = Features(lambda b, want: getattr(loaded.model(b), want), loaded.transform, loaded.composer)
    lines = sorted({line for own in captions for line in own})
    assert len(lines) == 21
    score_NT = image_NE @ features.texts(lines, batch_size=8).T
    hits = {name: [0, 0] for name in one}
    for n, own in enumerate(captions):
        right = [lines.index(line) for line in own]
        order = score_NT[n].argsort(descending=True).tolist()
        for k in (1, 3):
            hits[f"image_to_text/R@{k}"][0] += any(t in right for t in order[:k])
            hits[f"image_to_text/R@{k}"][1] += 1
        for t in right:
            order = score_NT[:, t].argsort(descending=True).tolist()
            for k in (1, 3):
                hits[f"text_to_image/R@{k}"][0] += any(lines[t] in captions[m] for m in order[:k])
                hits[f"text_to_image/R@{k}"][1] += 1
    assert {name: [round(s.value * s.count), s.count] for name, s in one.items()} == hits
    assert ranks.run(2, found, str(model), data, tmp_path / "two") == [one, one]


class Everything(methods.Method):
    """Trains the text tower."""

    serves = ("retrieve",)
    trains = ("model.text.*",)


def test_training_is_the_contrastive_loss_on_what_the_method_trains(tmp_path):
    loaded = pretrained.load(tiny.export(tmp_path / "export"))
    method = Everything(methods.Config(name="everything"), loaded, [])
    methods.Finetune(method)
    module = Contrast(method).train()
    assert isinstance(module, objectives.Mixture) and module.contrasts()
    assert loaded.model.text.training
    batch = tiny.batch(6)
    batch.caption_B[1] = batch.caption_B[0]
    loss, logs = module([batch])
    seen = loaded.model(batch)
    want = contrastive(seen.image, seen.text, scale=seen.scale, same_B=batch.caption_B)
    torch.testing.assert_close(loss, want)
    loss.backward()
    grads = {name for name, p in method.named_parameters() if p.grad is not None}
    assert grads == set(method.trained()) and set(logs) == {"contrastive", "contrastive/scale"}
    assert torch.equal(module.eval()([batch], want="image"), loaded.model.eval()(batch).image)
    assert not loaded.model.text.training

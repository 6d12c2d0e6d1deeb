"""Cached features: training on them is training on the pictures, whatever is interrupted, shared or unusable."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import encoded, features, main
from finetune.reading import Reading
from pretrain import config, pretrained
from pretrain.config import ConfigError
from pretrain.data import loader
from pretrain.data.excluded import Sample
from pretrain.data.format import ShardWriter
from pretrain.data.remote import Access
from pretrain.data.synthetic import CLASSES, sample
from pretrain.report import scores
from tests import tiny
from tests.finetune.test_main import delta, fine_tune, recipe_file

PLAIN = ("data.features=off", "data.decode=exact")
TIP_F = "{name: tip_adapter, train_keys: true, search: false, views: 1}"
COUNT = 23
BAD = (4, 5, 17)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pretrained.Pretrained:
    return pretrained.load(tiny.export(tmp_path_factory.mktemp("model") / "export"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    """Two shards with some pictures that cannot be decoded, and one class that is no number."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, members in enumerate((range(9), range(9, COUNT))):
        with ShardWriter(folder / f"{shard}.tar") as writer:
            for n in members:
                target = n % 3 if n != BAD[2] else "red"
                picture = sample(n, size=40, seed=0)["png"] if n not in BAD[:2] else b"<html>"
                label = f'{{"class": {target!r}, "name": "{CLASSES[n % 3]}"}}'.replace("'", '"')
                writer.add(f"s{n:03d}", {"png": picture, "json": label.encode()})
    return [str(folder / f"{n}.tar") for n in range(2)]


def table(base, shards, folder, kinds=("image", "pooled"), workers=0) -> encoded.Encoded:
    access = Access(cache_dir=str(folder))
    cpu = torch.device("cpu")
    return encoded.encode(
        shards, kinds, base=base, reader="classify", access=access, batch_size=4, workers=workers, device=cpu
    )


def test_rows_are_what_the_towers_say_of_the_pictures(base, shards, tmp_path):
    found = table(base, shards, tmp_path)
    assert sorted(found.bad) == list(BAD)
    assert "decoded" in found.bad[4] and "expected the index" in found.bad[17]
    batches = list(
        loader.scan(
            shards,
            reader={"classify": {}},
            transform=base.transform,
            composer=base.composer,
            batch_size=5,
            filled=False,
        )
    )
    with torch.no_grad():
        seen = [base.model(batch) for batch in batches]
        want = {"image_NE": torch.cat([s.image for s in seen]), "pooled_NC": torch.cat([s.pooled for s in seen])}
    good = [n for n in range(COUNT) if n not in BAD]
    assert [found.keys[n] for n in good] == [key for batch in batches for key in batch.keys]
    for name, rows_ND in want.items():
        torch.testing.assert_close(found.features[name][good], rows_ND, rtol=0, atol=1e-6)
    got = torch.cat([batch.target_B for batch in found.scan(4)])[: len(good)]
    assert torch.equal(got, torch.cat([batch.target_B for batch in batches]))


@pytest.mark.check("clip-adapter", 12)
def test_other_weights_and_another_look_have_rows_of_their_own(base):
    key = features.model_key(base, Access())
    assert key == features.model_key(dataclasses.replace(base, source="elsewhere"), Access())
    assert key != features.model_key(dataclasses.replace(base, weights_hash="others"), Access())
    for change in (
        {"image_size": 64}, {"mean": (0.5, 0.5, 0.5)}, {"interpolation": "bilinear"}, {"args": {"num_heads": 4}},
        {"name": "vit_base_patch32_clip_quickgelu_224"},
    ):  # fmt: skip
        section = base.config.model_copy(update={"vision": base.config.vision.model_copy(update=change)})
        assert key != features.model_key(dataclasses.replace(base, config=section), Access()), change
    frozen = base.config.model_copy(update={"vision": base.config.vision.model_copy(update={"frozen": True})})
    assert key == features.model_key(dataclasses.replace(base, config=frozen), Access())


def test_training_batches_are_those_of_the_loader_of_pictures(base, shards, tmp_path):
    """Replaced samples, samples and batches left out after a rollback, and where a resumed run begins."""
    section = loader.Config(shards=shards, lanes=2, workers=0, reader={"classify": {}}, decode="exact")
    section = section.model_copy(update={"augment": None})
    options = {
        "batch_size": 4, "seed": 5, "transform": base.transform, "composer": base.composer, "rank": 1, "world": 2,
    }  # fmt: skip
    slow = loader.Loader(section, **options)
    fast = encoded.Loader(table(base, shards, tmp_path), section, **options)
    assert fast.fingerprint() == slow.fingerprint() and fast.samples_per_epoch == COUNT

    def same(steps: int, start: int) -> list[dict[str, str]]:
        bad = []
        for _, a, b in zip(range(steps), slow.iterate(start), fast.iterate(start)):
            assert a.keys == b.keys and a.shards == b.shards and a.bad == b.bad
            assert torch.equal(a.target_B, b.target_B)
            with torch.no_grad():
                torch.testing.assert_close(b.image_NE, base.model(a).image, rtol=0, atol=1e-6)
            bad += b.bad
        return bad

    assert same(12, 0)
    same(3, 7)
    for one in (slow, fast):
        one.exclude(batches=[1], samples=[Sample(0, "0.tar", "s003")])
    same(12, 0)
    assert fast.state(3) == slow.state(3)


@pytest.mark.check("few-shot", 5)
def test_a_picture_is_encoded_once_wherever_it_lies(base, shards, tmp_path, monkeypatch):
    found = table(base, shards, tmp_path)
    calls = []
    monkeypatch.setattr(features, "_rows", lambda *args: calls.append(args))
    moved = [str(shutil.copy(path, tmp_path / f"moved-{Path(path).name}")) for path in reversed(shards)]
    again = table(base, moved, tmp_path, kinds=("image",))
    assert len(calls) == 0 and torch.equal(again.features["image_NE"][-9:], found.features["image_NE"][:9])
    monkeypatch.undo()
    other = pretrained.load(tiny.export(tmp_path / "export"))
    other.weights_hash = "another"
    table(other, shards, tmp_path, kinds=("image",))
    assert len({path.parents[1] for path in tmp_path.glob("features/*/*/*.safetensors")}) == 2


def test_an_interrupted_encoding_goes_on_behind_its_last_part(base, shards, tmp_path, monkeypatch):
    want = table(base, shards, tmp_path / "whole").features["image_NE"]
    monkeypatch.setattr(features, "PART", 4)
    real, done = features._rows, []

    def dies(*args):
        done.append(len(args[1]))
        if len(done) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(features, "_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        table(base, shards, tmp_path)
    kept = sum(done[:3])
    monkeypatch.setattr(features, "_rows", lambda *args: done.append(len(args[1])) or real(*args))
    done.clear()
    assert torch.equal(table(base, shards, tmp_path).features["image_NE"], want), (
        "a row depends on what else was lacking"
    )
    assert sum(done) == COUNT - len(BAD) - kept
    parts = list((tmp_path / "features").rglob("*.safetensors"))
    assert parts and not list((tmp_path / "features").rglob("*.part"))
    parts[0].write_bytes(b"torn")
    torch.testing.assert_close(table(base, shards, tmp_path).features["image_NE"], want, rtol=0, atol=1e-6)


def of_two(model: str, shards: list[str], folder: Path) -> list[torch.Tensor]:
    """Return a rank's table, and its batches with those of pictures."""
    found = table(pretrained.load(model), shards, folder)
    batches = list(found.scan(3))
    own = [batch.image_NE[: len(batch) - batch.filler] for batch in batches]
    assert len({len(batch) for batch in batches[:-1]}) == 1
    return [found.features["image_NE"], torch.cat(own)]


def test_two_ranks_share_the_work_and_see_all_of_it(base, shards, tmp_path, ranks):
    want = table(base, shards, tmp_path / "one")
    first, second = ranks.run(2, of_two, base.source, shards, tmp_path / "two")
    torch.testing.assert_close(first[0], want.features["image_NE"], rtol=0, atol=1e-6)
    assert torch.equal(first[0], second[0])
    assert len(first[1]) + len(second[1]) == COUNT - len(BAD)
    assert len(list((tmp_path / "two").glob("features/*/image/*.safetensors"))) == 2


def on_nodes_of_their_own(model: str, shards: list[str], folder: Path) -> torch.Tensor:
    from pretrain import dist

    return table(pretrained.load(model), shards, folder / str(dist.rank())).features["image_NE"]


def test_nodes_with_caches_of_their_own_exchange_rows(base, shards, tmp_path, ranks):
    first, second = ranks.run(2, on_nodes_of_their_own, base.source, shards, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, table(base, shards, tmp_path / "one").features["image_NE"], rtol=0, atol=1e-6)


@pytest.mark.check("linear-probe", 7)
@pytest.mark.check("clip-adapter", 9)
@pytest.mark.parametrize(
    "method",
    [
        "{name: coop, length: 4}",
        "{name: clip_adapter}",
        "{name: linear_probe, c: 1.0}",
        TIP_F,
        "{name: lora, towers: text, roles: [q, v]}",
    ],
)
def test_a_run_on_the_table_ends_as_one_that_encodes_each_step(method, tmp_path, ranks):
    file = str(recipe_file(tmp_path, method=method))
    assert ranks.run(1, fine_tune, file, "zero.stage=0") == [(0, True)]
    kept, kept_scores = delta(tmp_path), scores.newest(tmp_path / "runs" / "run")
    assert ranks.run(1, fine_tune, file, "zero.stage=0", "run.name=plain", *PLAIN) == [(0, True)]
    for name, want in delta(tmp_path, "plain").items():
        torch.testing.assert_close(kept[name], want, rtol=2e-5, atol=2e-5)
    assert scores.newest(tmp_path / "runs" / "plain") == kept_scores


def test_updates_of_the_text_tower_alone_read_features_where_a_task_names_classes(tmp_path):
    for towers, classes, captions in (("text", ("image",), ()), ("both", (), ())):
        path = recipe_file(tmp_path, method=f"{{name: lora, towers: {towers}}}")
        cpu = torch.device("cpu")
        assert main.Job(config.load(main.Recipe, path), cpu).reading.kinds == classes
        words = [f"task={{name: retrieval, data: {tiny.pairs(tmp_path / 'pairs')}}}"]
        assert main.Job(config.load(main.Recipe, path, words), cpu).reading.kinds == captions


def test_training_without_augmentation_sees_what_an_evaluation_sees(base, tmp_path):
    """A photograph, which the fast way decodes at a part of its size."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "train.tar") as writer:
        for n in range(2):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8)).save(file, "jpeg")
            writer.add(f"s{n}", {"jpg": file.getvalue(), "json": b'{"class": 0, "name": "red"}'})
    section = config.load(main.Recipe, recipe_file(tmp_path), ["data.features=off", "train.batch_size=2"])
    task = main.tasks.Task(section.task)
    task.reader, cpu = "classify", torch.device("cpu")
    reading = Reading(section, task, base, pictures_by="features", device=cpu)
    trained = next(iter(reading.training([str(tmp_path / "train.tar")]).iterate()))
    scored = next(reading.scan([str(tmp_path / "train.tar")], "train"))
    assert torch.equal(trained.image_NCHW[[trained.keys.index(key) for key in scored.keys]], scored.image_NCHW)


def test_augmented_training_reads_pictures_and_says_so(base, tmp_path):
    def reading(*words: str, pictures_by: str = "features") -> Reading:
        section = config.load(main.Recipe, recipe_file(tmp_path), words)
        task = main.tasks.Task(section.task)
        return Reading(section, task, base, pictures_by=pictures_by, device=torch.device("cpu"))

    assert reading().trains_on_tables and not reading().note
    moved = reading("data.augment={flip: 0.5}")
    assert moved.kinds == ("image",) and not moved.trains_on_tables and "encodes every picture anew" in moved.note
    assert reading("data.features=off").kinds == () == reading(pictures_by="pixels").kinds
    with pytest.raises(ConfigError, match=r"data\.features"):
        config.load(main.Recipe, recipe_file(tmp_path), ["data.features=on"])

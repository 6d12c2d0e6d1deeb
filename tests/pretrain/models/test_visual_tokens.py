"""Regions and cells by row: order, padding, pictures of a row, boxes, areas, and what is refused."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.models import vision, visual_tokens
from pretrain.models.visual_embedding import VisualEmbedding
from tests.pretrain.models import tiny_vlt5

CPU = torch.device("cpu")


def source(kind: str, **keys) -> torch.nn.Module:
    return visual_tokens.build(tiny_vlt5.section(source=kind, **keys).vision).eval()


def test_regions_come_in_the_order_of_the_batch() -> None:
    batch = tiny_vlt5.batch()
    found = source("region", regions=2)(batch, CPU)
    assert found.valid_BR.tolist() == [[True, True], [True, False], [False, False], [True, True]]
    assert torch.equal(found.features_BRC[0], batch.region_KC[:2]), "the third is left out"
    assert torch.equal(found.boxes_BR4[3], batch.boxes_K4[4:6]) and torch.equal(
        found.boxes_BR4[1, 0], batch.boxes_K4[3]
    )
    assert found.region_BR.tolist() == [[0, 1]] * 4 and not found.image_BR.any()
    none = source("region", regions=2)(dataclasses.replace(batch, region_KC=None), CPU)
    assert not none.valid_BR.any() and none.features_BRC.shape == found.features_BRC.shape
    with pytest.raises(ConfigError, match=r"model.vision.width: 6, the features of the data have 5 numbers"):
        source("region")(dataclasses.replace(batch, region_KC=batch.region_KC[:, :5]), CPU)


@torch.no_grad()
def test_cells_of_two_pictures() -> None:
    made = source("grid", images=2)
    picture_NCHW = torch.randn(3, 3, 64, 64)
    batch = Batch(keys=list("abc"), image_NCHW=picture_NCHW, owner_N=torch.tensor([0, 0, 2]))
    found = made(batch, CPU)
    assert found.valid_BR.tolist() == [[True] * 8, [False] * 8, [True] * 4 + [False] * 4]
    assert found.image_BR[1].tolist() == [0] * 4 + [1] * 4 and found.region_BR[2].tolist() == [0, 1, 2, 3] * 2
    map_NPC = made.tower(picture_NCHW).tokens_NPC
    assert torch.allclose(found.features_BRC[0], map_NPC[:2].flatten(0, 1), atol=1e-5)
    assert torch.allclose(found.features_BRC[2, :4], map_NPC[2], atol=1e-5)
    quarters = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert found.boxes_BR4[0].tolist() == quarters * 2
    assert not source("grid", grid_boxes="zero")(
        dataclasses.replace(batch, owner_N=torch.arange(3)), CPU
    ).boxes_BR4.any()


@torch.no_grad()
def test_cells_are_pooled_by_their_maxima() -> None:
    picture_NCHW = torch.randn(2, 3, 32, 32)
    made = source("patch", cells=2)
    found = made(Batch(keys=["a", "b"], image_NCHW=picture_NCHW), CPU)
    map_NCHW = made.tower(picture_NCHW).tokens_NPC.transpose(1, 2).unflatten(-1, (4, 4))
    assert torch.equal(found.features_BRC, F.max_pool2d(map_NCHW, 2).flatten(2).transpose(1, 2))


def test_a_batch_without_pictures_runs_the_tower_on_a_zero_one() -> None:
    made, calls = source("patch"), []
    made.tower.register_forward_hook(lambda _, args, out: calls.append(args[0]))
    found = made(Batch(keys=["a", "b"]), CPU)
    assert [tuple(x.shape) for x in calls] == [(1, 3, 32, 32)] and not calls[0].any()
    assert not found.valid_BR.any() and found.features_BRC.requires_grad


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("are those of source=patch", {"source": "grid", "tower": tiny_vlt5.PATCHES}),
        ("are those of source=grid", {"source": "patch", "tower": tiny_vlt5.TOWER}),
        ("sentinels for 100", {"source": "patch", "tower": {**tiny_vlt5.PATCHES.model_dump(), "image_size": 96}}),
        ("set it to 2", {"source": "patch", "tower": tiny_vlt5.PATCHES, "pictures": 4}),
    ],
)
def test_what_does_not_fit_is_refused(words: str, keys: dict) -> None:
    size, pictures = (keys["tower"]["image_size"] if isinstance(keys["tower"], dict) else 32), keys.pop("pictures", 1)
    with pytest.raises(ConfigError, match=words):
        visual_tokens.build(visual_tokens.Config(**keys))(
            Batch(
                keys=["a", "b"], image_NCHW=torch.zeros(pictures, 3, size, size), owner_N=torch.arange(pictures) // 2
            ),
            CPU,
        )


@pytest.mark.parametrize(
    "keys",
    [{"source": "grid"}, {"tower": tiny_vlt5.TOWER}, {"cells": 2}, {"images": 2}, {"regions": 101},
     {"source": "patch", "tower": {"patch_dropout": 0.5}}],
)  # fmt: skip
def test_keys_that_contradict_each_other(keys: dict) -> None:
    with pytest.raises(ValueError):
        visual_tokens.Config(**keys)


def test_areas() -> None:
    box_14 = torch.tensor([[0.1, 0.2, 0.5, 0.8]])
    for mode, area in (("correct", 0.4 * 0.6), ("legacy", (0.8 - 0.5) * (0.2 - 0.1))):
        made = VisualEmbedding(6, 4, rms=True, norm="each", area_mode=mode)
        assert torch.allclose(made.place(box_14), torch.tensor([[0.1, 0.2, 0.5, 0.8, area]]))


def test_a_picture_that_is_not_there_is_in_no_statistics() -> None:
    """A batch of text alone, as one of a blend by batches is: the tower runs, its batch norms stay as they were."""
    tower = vision.Config(name="resnet18", image_size=64, args={"layers": [1, 1, 1, 1]})
    made = visual_tokens.build(visual_tokens.Config(source="grid", tower=tower)).train()
    batch = dataclasses.replace(tiny_vlt5.batch(size=64), image_NCHW=None, owner_N=None)
    assert not made(batch, CPU).valid_BR.any()
    norms = [part for part in made.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.num_batches_tracked or norm.running_mean.any() for norm in norms)

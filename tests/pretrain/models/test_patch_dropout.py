"""Patches are left out by the sample's hash: the same alone, in any batch, on any rank; none in evaluation."""

import dataclasses

import pytest
import torch
from timm.layers import PatchDropout as Timm

from pretrain.config import ConfigError, build
from pretrain.models import patch_dropout, vision
from pretrain.models.patch_dropout import PatchDropout
from tests import tiny

DRAW_N = torch.tensor([3, 2**62 + 11, 5, 3])


def dropping(rate: float = 0.5) -> torch.nn.Module:
    section = tiny.vit_section()
    section.vision.patch_dropout = rate
    return tiny.model(section)


def test_keeps_the_classes_and_a_share_of_the_patches_in_order():
    x_NPC = torch.arange(4 * 17).view(4, 17, 1).float()
    layer = PatchDropout(0.3, prefix_tokens=1)
    layer.draw_N = DRAW_N
    out_NPC = layer(x_NPC)
    assert out_NPC.shape == Timm(0.3)(x_NPC).shape == (4, 1 + 11, 1)
    assert torch.equal(out_NPC[:, 0], x_NPC[:, 0])
    assert (out_NPC.diff(dim=1) > 0).all()
    assert torch.equal(out_NPC[0], out_NPC[3] - 51)  # equal hashes, equal patches
    assert not torch.equal(out_NPC[0] % 17, out_NPC[1] % 17)
    layer.eval()
    assert layer(x_NPC) is x_NPC


def test_every_patch_is_kept_equally_often():
    kept_NK = patch_dropout.scores(torch.arange(4000), 16).argsort(1)[:, :4]
    counts = torch.bincount(kept_NK.flatten(), minlength=16) / 4000
    assert (counts - 0.25).abs().max() < 0.03  # four standard deviations


def test_golden_scores():
    assert patch_dropout.scores(torch.tensor([0]), 2).tolist() == [[-2152535657050944081, 7960286522194355700]]


def test_features_depend_on_the_sample_alone_and_not_on_the_generator():
    model = dropping()
    image_NCHW = tiny.batch(4).image_NCHW
    torch.manual_seed(0)
    whole = model.vision(image_NCHW, draw_N=DRAW_N)
    torch.manual_seed(1)
    parts = [model.vision(image_NCHW[i : i + 1], draw_N=DRAW_N[i : i + 1]).image_NE for i in range(4)]
    torch.testing.assert_close(whole.image_NE, torch.cat(parts))
    assert whole.tokens_NPC.shape[1] == 8
    assert not torch.allclose(model.vision(image_NCHW, draw_N=DRAW_N + 1).image_NE, whole.image_NE)


def test_evaluation_sees_all_patches():
    model, plain = dropping().eval(), tiny.model().eval()
    image_NCHW = tiny.batch(2).image_NCHW
    assert torch.equal(model.vision(image_NCHW).image_NE, plain.vision(image_NCHW).image_NE)


def test_gradients_of_two_halves_are_those_of_the_whole():
    model, batch = dropping(), dataclasses.replace(tiny.batch(4), draw_B=DRAW_N)
    model(batch).image.sum().backward()
    whole = model.vision.trunk.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        part = dataclasses.replace(batch, image_NCHW=batch.image_NCHW[rows], draw_B=DRAW_N[rows])
        model(part).image.sum().backward()
    torch.testing.assert_close(model.vision.trunk.patch_embed.proj.weight.grad, whole)


def test_further_images_of_a_row_lose_other_patches():
    batch = dataclasses.replace(tiny.batch(2), draw_B=DRAW_N[:2], owner_N=torch.tensor([0, 0, 1]))
    encodings = dropping()(batch)
    assert encodings._draw_N.tolist() == [3, 4, 2**62 + 11]


def test_what_cannot_drop_patches_is_refused():
    section = tiny.conv_section()
    section.vision.patch_dropout = 0.5
    with pytest.raises(ConfigError, match="cannot leave patches out"):
        tiny.model(section)
    with pytest.raises(ConfigError, match="use patch_dropout instead"):
        build(vision.Config, {"args": {"patch_drop_rate": 0.5}})

"""The two-tower model: published size, temperature limits, each feature computed once, refusals."""

import math

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.models import text, vision, vlm
from tests import tiny


def test_vit_b_32_has_the_published_number_of_parameters() -> None:
    section = vlm.Config(text=text.Config(vocab_size=49408))
    with torch.device("meta"):
        model = vlm.VLM(section, end=49407, pad=49407)
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


def test_no_parameter_is_0_dimensional() -> None:
    assert all(p.ndim for p in tiny.model().parameters())


def test_scale_is_clamped_in_forward() -> None:
    model = tiny.model()
    assert model.scale.item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(10.0)
    assert model.scale.item() == pytest.approx(100.0)
    assert model.logit_scale.item() == 10.0
    assert pytest.approx(4.6052, abs=1e-4) == vlm.VLM.MAX_LOGIT_SCALE
    assert math.log(1 / 0.07) == pytest.approx(2.65926, abs=1e-5)


@pytest.mark.parametrize("section", [tiny.vit_section, tiny.conv_section])
def test_features_are_unit_norm_and_computed_once(section) -> None:
    model, batch = tiny.model(section()).eval(), tiny.batch()
    calls: list[str] = []
    model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    model.text.register_forward_hook(lambda *_: calls.append("text"))
    encodings = model(batch)
    for feature in (encodings.image, encodings.text, encodings.image):
        torch.testing.assert_close(feature.norm(dim=1), torch.ones(len(batch)))
    assert encodings.image_tokens.shape[::2] == (len(batch), model.vision.width)
    assert sorted(calls) == ["text", "vision"]


@torch.no_grad()
def test_bytes_are_normalised_once_on_the_way_in() -> None:
    model = tiny.model().eval()
    bytes_NCHW = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean_C11, std_C11 = (torch.tensor(v)[:, None, None] for v in (vision.CLIP_MEAN, vision.CLIP_STD))
    floats_NCHW = (bytes_NCHW / 255.0 - mean_C11) / std_C11
    assert torch.equal(model.vision.normalise(bytes_NCHW), floats_NCHW)
    assert torch.equal(model.vision(bytes_NCHW).image_NE, model.vision(floats_NCHW).image_NE)
    assert not [name for name in model.state_dict() if "normalise" in name]


def test_frozen_trunk_stays_in_eval_mode_and_gets_no_gradient() -> None:
    section = tiny.conv_section()
    section.vision.frozen = True
    model = tiny.model(section).train()
    assert not model.vision.trunk.training
    encodings = model(tiny.batch())
    (encodings.image @ encodings.text.T).sum().backward()
    assert all(p.grad is None for p in model.vision.trunk.parameters())
    assert model.vision.projection.weight.grad is not None


def test_unknown_tower_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'convnext_atto'"):
        vision.VisionTower(vision.Config(name="convnext_ato"), 8)
    with pytest.raises(ConfigError, match="neither `native` nor"):
        text.build(text.Config(name="bert"), 8, end=1, pad=0)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        text.build(text.Config(name="hf:nowhere"), 8, end=1, pad=0)

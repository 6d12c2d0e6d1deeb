"""EfficientNet-PyTorch's weights in timm's towers: equal features with the real library, leftovers refused."""

from pathlib import Path

import efficientnet_lite_pytorch
import pytest
import torch

from pretrain.config import ConfigError
from pretrain.models import convert_efficientnet, vision


def theirs() -> torch.nn.Module:
    """Return the real library's network with random weights and random statistics of its batch norms."""
    torch.manual_seed(0)
    model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0").eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return theirs()


def test_features_equal_the_real_library(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "lite0.pth"
    torch.save(network.state_dict(), path)
    section = vision.Config(name="tf_efficientnet_lite0", image_size=64, weights=str(path), frozen=True)
    tower = vision.VisionTower(section, 8).eval()
    image_NCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        grid_NCHW = network.extract_features(image_NCHW)
        tokens_NPC = tower(image_NCHW).tokens_NPC
    assert not any(p.requires_grad for p in tower.trunk.parameters())
    torch.testing.assert_close(tokens_NPC, grid_NCHW.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["missing", "left"])
def test_a_weight_without_a_place_is_an_error(network: torch.nn.Module, change: str) -> None:
    state = dict(network.state_dict())
    if change == "missing":
        del state["_blocks.3._bn1.running_var"]
    else:
        state["_blocks.3._extra.weight"] = torch.zeros(1)
    trunk = vision.VisionTower(vision.Config(name="tf_efficientnet_lite0", image_size=64), 8).trunk
    with pytest.raises(ConfigError, match=r"running_var|_extra"):
        convert_efficientnet.to_timm(state, trunk.state_dict())

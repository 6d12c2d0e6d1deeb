"""The ResNet stem beside timm's ResNet, and its three kinds of batch norm."""

import pytest
import timm
import torch

from pretrain import dist
from pretrain.config import ConfigError
from pretrain.models import resnet_stem


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    """A ResNet-50 with random weights and statistics away from zero and one."""
    torch.manual_seed(0)
    net = timm.create_model("resnet50", pretrained=False)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("norm", ["plain", "frozen"])
def test_three_stages_of_the_published_net(published: torch.nn.Module, norm: str) -> None:
    image_NCHW = torch.randn(2, 3, 64, 48)
    expected = image_NCHW
    for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
        expected = getattr(published, name)(expected)
    stem = resnet_stem.ResNetStem(resnet_stem.BLOCKS["resnet50"], norm=norm)
    stem.fill(published.state_dict())
    stem.train(norm == "frozen")
    assert stem(image_NCHW).shape == (2, 1024, 4, 3) == expected.shape
    torch.testing.assert_close(stem(image_NCHW), expected)


def test_frozen_norms_train_nothing_and_never_change() -> None:
    stem = resnet_stem.ResNetStem((1, 1, 1), norm="frozen", width=4).train()
    before = {name: value.clone() for name, value in stem.state_dict().items()}
    stem(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in stem.state_dict().items())
    assert not any("bn" in name for name, _ in stem.named_parameters())
    assert set(before) == set(resnet_stem.ResNetStem((1, 1, 1), width=4).state_dict())


def test_weights_of_another_net_are_refused() -> None:
    stem = resnet_stem.ResNetStem((1, 1, 1), width=4)
    for state in ({"conv1.weight": torch.zeros(1)}, {}):
        with pytest.raises(ConfigError, match="do not fit"):
            stem.fill(state)


def statistics(norm: str, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Run on every rank: outputs of this rank's pictures, their gradients, and the statistics that are kept."""
    torch.manual_seed(0)
    layer = resnet_stem.NORMS[norm](3).double().train()
    layer.weight.data.normal_()
    whole = torch.randn(8, 3, 4, 5, dtype=torch.float64)
    pull = torch.randn_like(whole)
    mine = whole.split(sizes)[dist.rank()].clone()
    layer.counted = len(mine) > 0
    mine = (mine if layer.counted else torch.ones(1, 3, 2, 2, dtype=torch.float64)).requires_grad_()
    out = layer(mine)
    (out * (pull.split(sizes)[dist.rank()] if layer.counted else 0)).sum().backward()
    weight = dist.total(layer.weight.grad)
    return {"out": out.detach(), "grad": mine.grad, "weight": weight, "mean": layer.running_mean,
            "var": layer.running_var}  # fmt: skip


@pytest.mark.slow
def test_synchronous_norms_see_the_pictures_of_all_ranks(ranks) -> None:
    [whole] = ranks.run(1, statistics, "plain", (8,))
    for sizes in ((4, 4), (2, 6), (8, 0)):
        first, second = ranks.run(2, statistics, "sync", sizes)
        for name in ("out", "grad"):
            both = torch.cat([first[name], second[name]]) if sizes[1] else first[name]
            torch.testing.assert_close(both, whole[name], rtol=0, atol=1e-12)
        for name in ("weight", "mean", "var"):
            torch.testing.assert_close(first[name], whole[name], rtol=0, atol=1e-12)
            torch.testing.assert_close(second[name], whole[name], rtol=0, atol=1e-12)


def nobody() -> tuple[torch.Tensor, torch.Tensor]:
    """Run on every rank: no rank has a picture."""
    layer = resnet_stem.SyncBatchNorm(3).train()
    layer.running_mean.fill_(2.0)
    layer.counted = False
    return layer(torch.full((1, 3, 1, 1), 2.0)).detach(), layer.running_mean


@pytest.mark.slow
def test_synchronous_norms_without_any_picture(ranks) -> None:
    for out, mean in ranks.run(2, nobody):
        assert not out.any() and torch.equal(mean, torch.full((3,), 2.0))

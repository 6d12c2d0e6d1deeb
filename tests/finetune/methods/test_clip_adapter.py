"""CLIP-Adapter's identities and counts (Gao et al. 2021)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.methods import base, clip_adapter
from pretrain import pretrained
from pretrain.config import ConfigError
from pretrain.evals.base import Features
from pretrain.evals.zero_shot import class_weights
from tests import tiny

NAMES = ["red circle", "blue square", "green ring"]
TEMPLATES = ["a photo of a {}.", "one {}"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> pretrained.Pretrained:
    return pretrained.load(tiny.export(tmp_path_factory.mktemp("export")))


def method(loaded, **keys) -> clip_adapter.Method:
    torch.manual_seed(0)
    return clip_adapter.Method(clip_adapter.Config(name="clip_adapter", templates=TEMPLATES, **keys), loaded, NAMES)


def labelled(rows: int = 6):
    batch = tiny.batch(rows)
    batch.target_B = torch.arange(rows) % len(NAMES)
    return batch


def zero_shot(loaded, batch) -> torch.Tensor:
    """Return the base's cosines with the classes, as evaluations compute them."""
    run = Features(lambda b, want: getattr(loaded.model(b), want), loaded.transform, loaded.composer)
    return loaded.model(batch).image @ class_weights(run, NAMES, TEMPLATES, batch_size=2).T


@pytest.mark.check("clip-adapter", 1)
@pytest.mark.parametrize("towers", ["vision", "both"])
@torch.no_grad()
def test_a_share_of_nothing_is_zero_shot(loaded, towers):
    made, batch = method(loaded, alpha=0.0, beta=0.0, towers=towers), labelled()
    cosine_NK = made.classify(batch, made.classes()) / made.scale_1
    torch.testing.assert_close(cosine_NK, zero_shot(loaded, batch), rtol=0, atol=1e-6)


@pytest.mark.check("clip-adapter", 2)
@pytest.mark.parametrize("alpha", [0.2, 0.9])
@torch.no_grad()
def test_an_adapter_that_gives_nothing_is_zero_shot(loaded, alpha):
    made, batch = method(loaded, alpha=alpha), labelled()
    made.vision_adapter.up.weight.zero_()
    cosine_NK = made.classify(batch, made.classes()) / made.scale_1
    torch.testing.assert_close(cosine_NK, zero_shot(loaded, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("last_relu", [True, False])
@torch.no_grad()
def test_it_is_the_released_formula_on_features_that_are_not_normalised(loaded, last_relu):
    made = method(loaded, last_relu=last_relu, alpha=0.3)
    raw_NE = 7.0 * torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    w1_DE, w2_ED = made.vision_adapter.down.weight, made.vision_adapter.up.weight
    adapted_NE = (raw_NE @ w1_DE.T).relu() @ w2_ED.T
    mixed_NE = 0.3 * (adapted_NE.relu() if last_relu else adapted_NE) + 0.7 * raw_NE
    want_NK = made.scale_1 * F.normalize(mixed_NE, dim=-1) @ made.classes().T
    found_NK = made.classify_features(F.normalize(raw_NE, dim=-1), made.classes())
    torch.testing.assert_close(found_NK, want_NK, rtol=0, atol=2e-5)


@pytest.mark.check("clip-adapter", 10)
@pytest.mark.parametrize("towers", ["vision", "text", "both"])
def test_only_adapters_train_and_they_do(loaded, towers):
    module = base.Finetune(method(loaded, towers=towers)).train()
    module([labelled()])[0].backward()
    moving = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    want = {"vision": ["vision"], "text": ["text"], "both": ["vision", "text"]}[towers]
    assert moving == {f"method.{tower}_adapter.{part}.weight" for tower in want for part in ("down", "up")}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == moving


@pytest.mark.check("clip-adapter", 9)
def test_training_on_kept_features_is_training_on_pictures(loaded):
    found = []
    for keep in (True, False):
        made, batch = method(loaded), labelled()
        module = base.Finetune(made).train()
        image_NE = loaded.model(batch).image.detach()
        sgd = torch.optim.SGD(made.vision_adapter.parameters(), lr=1.0, momentum=0.9)
        for _ in range(5):
            sgd.zero_grad()
            if keep:
                F.cross_entropy(made.classify_features(image_NE, made.classes()), batch.target_B).backward()
            else:
                module([batch])[0].backward()
            sgd.step()
        found.append(made.vision_adapter.down.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_text_is_encoded_once(loaded):
    made, calls = method(loaded, towers="both"), []
    hook = loaded.model.text.register_forward_hook(lambda *_: calls.append(1))
    module = base.Finetune(made).train()
    for _ in range(3):
        module([labelled()])
    hook.remove()
    assert len(calls) == 1


def test_524288_parameters_for_rn50():
    with torch.device("meta"):
        made = clip_adapter.adapter(1024, clip_adapter.Config(name="clip_adapter"))
    assert sum(p.numel() for p in made.parameters()) == 524288
    assert isinstance(made.last, nn.ReLU) and clip_adapter.Method.epochs(16) == 200


def test_a_sentence_that_would_be_cut_off_is_refused(loaded):
    section = clip_adapter.Config(name="clip_adapter")
    with pytest.raises(ConfigError, match="shorten the class name or the template"):
        clip_adapter.Method(section, loaded, ["red circle", "very " * 40 + "long"])

"""Full fine-tuning and WiSE-FT: both ends, what trains, the head that starts as zero-shot."""

import pytest
import torch

from finetune import delta
from finetune.methods import base, full
from pretrain import pretrained
from pretrain.config import ConfigError, build
from pretrain.engine import optim
from tests.finetune.methods.test_clip_adapter import NAMES, TEMPLATES, labelled, zero_shot


def method(loaded, **keys) -> full.Method:
    torch.manual_seed(0)
    return full.Method(full.Config(name="full", templates=TEMPLATES, **keys), loaded, NAMES).eval()


def trained(made: full.Method) -> full.Method:
    """Move the weights as training would, the same for every `wise`."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in made.trained().values():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return made


@pytest.mark.check("full", 1)
@pytest.mark.parametrize("head", ["text", "linear"])
@torch.no_grad()
def test_before_training_it_is_zero_shot(loaded, head):
    made, batch = method(loaded, head=head), labelled()
    found_NK = made.classify(batch, made.classes()) / made.scale_1
    torch.testing.assert_close(found_NK, zero_shot(loaded, batch), rtol=0, atol=1e-6)


@pytest.mark.check("full", 2)
@pytest.mark.parametrize("head, towers", [("text", "vision"), ("text", "both"), ("linear", "vision")])
@torch.no_grad()
def test_wise_has_base_and_tuned_at_its_ends(folder, head, towers):
    def answers(wise: float | None) -> torch.Tensor:
        made = method(pretrained.load(folder), head=head, towers=towers, wise=wise)
        trained(made).settle()
        return made.classify(labelled(), made.classes())

    untouched = method(pretrained.load(folder))
    tuned_NK, base_NK = answers(None), untouched.classify(labelled(), untouched.classes())
    torch.testing.assert_close(answers(1.0), tuned_NK, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers(0.0), base_NK, rtol=0, atol=1e-5)
    assert (answers(0.5) - tuned_NK).abs().max() > 1e-3 and (tuned_NK - base_NK).abs().max() > 1e-2


@pytest.mark.check("full", 3)
@torch.no_grad()
def test_wise_is_linear_in_the_weights(loaded):
    start = {name: p.clone() for name, p in loaded.model.vision.named_parameters()}
    made = method(loaded, wise=0.3)
    trained(made)
    tuned = {name: p.clone() for name, p in loaded.model.vision.named_parameters()}
    made.settle()
    for name, p in loaded.model.vision.named_parameters():
        torch.testing.assert_close(p, 0.7 * start[name] + 0.3 * tuned[name])


@pytest.mark.check("full", 4)
@torch.no_grad()
def test_a_delta_is_mixed_anew(loaded, folder, tmp_path):
    made, batch = method(loaded, wise=0.5), labelled()
    state = trained(made).state()
    delta.write(tmp_path / delta.FILE, state, pretrained=loaded, method=made.config, names=NAMES)
    tuned_NK = made.classify(batch, made.classes())
    made.settle()
    found = {}
    for wise in (0.5, 1.0):
        fresh = pretrained.load(folder)
        again = delta.read(tmp_path / delta.FILE, fresh, changes=[f"method.wise={wise}"])
        found[wise] = again.classify(batch, again.classes())
    assert torch.equal(found[0.5], made.classify(batch, made.classes()))
    torch.testing.assert_close(found[1.0], tuned_NK, rtol=0, atol=1e-5)


@pytest.mark.check("full", 5)
@pytest.mark.parametrize("towers", ["vision", "text", "both"])
def test_what_trains_has_a_gradient(loaded, towers):
    module = base.Finetune(method(loaded, towers=towers)).train()
    module([labelled()])[0].backward()
    with_grad = {n for n, p in module.named_parameters() if p.grad is not None}
    assert with_grad == {f"method.{name}" for name in module.method.trained()}
    starts = {"vision": {"vision"}, "text": {"text"}, "both": {"vision", "text", "logit_scale"}}[towers]
    assert {name.split(".")[2] for name in with_grad} == starts
    assert module.method.model.vision.training == (towers != "text")


@pytest.mark.check("full", 6)
def test_layers_get_their_share_of_the_rate(loaded):
    module = base.Finetune(method(loaded, towers="both"))
    groups = optim.groups(module, optim.Config(lr=1e-3, layer_decay={"vision": 0.5}))
    shares = {g["name"].removesuffix(", decayed"): g["lr_scale"] for g in groups}
    assert shares["vision layer 0 of 3"] == 0.125 and shares["vision layer 3 of 3"] == 1.0
    assert shares["the rest"] == 1.0


def test_refusals(loaded):
    with pytest.raises(ConfigError, match="linear reads no text"):
        build(full.Config, {"name": "full", "head": "linear", "towers": "both"})
    with pytest.raises(ConfigError, match="a linear head has no place"):
        method(loaded, head="linear").merge()

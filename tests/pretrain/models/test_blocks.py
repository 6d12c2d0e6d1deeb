"""Blocks of every kind of tower are found; recomputing them changes no gradient and keeps less."""

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pretrain.config import ConfigError
from pretrain.models import blocks, vlm
from pretrain.objectives import base, contrastive
from tests import tiny


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("vit_base_patch32_clip_224", 12, "blocks.0", "blocks.11"),
        ("convnext_atto", 12, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("resnet18", 8, "layer1.0", "layer4.1"),
        ("efficientnet_lite0", 16, "blocks.0.0", "blocks.6.0"),
        ("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0", "layers.3.blocks.1"),
    ],
)
def test_blocks_of_timm_towers(name, count, first, last):
    with torch.device("meta"):
        found = list(blocks.find(timm.create_model(name)))
    assert (len(found), found[0], found[-1]) == (count, first, last)


def test_blocks_of_our_model_and_of_bert():
    found = list(blocks.find(tiny.model()))
    assert found == [f"vision.trunk.blocks.{i}" for i in (0, 1)] + [f"text.blocks.{i}" for i in (0, 1)]
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2))
    assert list(blocks.find(bert)) == [f"encoder.layer.{i}" for i in range(3)]


def mixture(vision: bool | int = False, text: bool | int = False, **args: object) -> base.Mixture:
    section = tiny.vit_section(**{"depth": 4, **args})
    section.vision.checkpointing, section.text.checkpointing, section.text.layers = vision, text, 4
    return base.Mixture(tiny.model(section), {"contrastive": contrastive.Objective(contrastive.Config())})


def gradients(module: nn.Module, rows: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)  # dropout
    module([tiny.batch(rows)])[0].backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("every", [True, 3])
@pytest.mark.parametrize("args", [{}, {"drop_path_rate": 0.5, "proj_drop_rate": 0.3}])
def test_recomputation_changes_no_gradient(every, args):
    plain, lean = gradients(mixture(**args)), gradients(mixture(every, every, **args))
    assert plain.keys() == lean.keys()
    for name in plain:
        assert torch.equal(plain[name], lean[name]), name


def peak(module: nn.Module) -> int:
    """Return the most bytes that a forward and backward hold at once."""
    gradients(module, 32)
    module.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        gradients(module, 32)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_recomputation_lowers_the_peak_of_memory():
    plain, some, all_ = (peak(mixture(every, every, depth=8)) for every in (False, 2, True))
    assert all_ < some < plain and all_ < 0.5 * plain, (plain, some, all_)


def test_towers_that_cannot_are_refused():
    for name, words in (("resnet18", "batch norms"), ("mixnet_s", "batch norms"), ("vgg11", "no repeated blocks")):
        with torch.device("meta"):
            trunk = timm.create_model(name)
        with pytest.raises(ConfigError, match=words):
            blocks.recompute(trunk, True, key="model.vision.checkpointing")


def test_a_frozen_block_with_batch_norm_may_be_recomputed():
    with torch.device("meta"):
        trunk = timm.create_model("resnet18").requires_grad_(False)
    blocks.recompute(trunk, True, key="k")
    assert isinstance(trunk.layer1[0].forward, blocks.Recomputed)


def test_a_section_takes_true_or_a_number():
    for value in (True, False, 2):
        made = vlm.vision_towers.Config(checkpointing=value)
        assert made.checkpointing is value or made.checkpointing == value != 1

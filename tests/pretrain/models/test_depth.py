"""Which parameter lies how deep, and what a locked tower with open blocks trains."""

import pytest
import torch

from pretrain.config import ConfigError, build
from pretrain.engine import optim
from pretrain.models import vlm
from pretrain.objectives import base
from tests import tiny


def test_depths_of_both_towers():
    found = {name: d.layer for name, d in tiny.model().depths().items()}
    assert found["vision.trunk.patch_embed.proj.weight"] == found["vision.trunk.pos_embed"] == 0
    assert found["vision.trunk.blocks.1.mlp.fc1.weight"] == found["text.blocks.1.mlp.up.weight"] == 2
    assert found["vision.trunk.norm.weight"] == found["text.norm.weight"] == 2
    assert found["text.token_embedding.weight"] == found["text.positional_embedding"] == 0
    assert found["vision.projection.weight"] == found["text.projection.weight"] == 3
    assert found.keys() == dict(tiny.model().named_parameters()).keys() - {"logit_scale"}


def test_depths_of_a_convolutional_tower():
    found = {name: d.layer for name, d in tiny.model(tiny.conv_section()).depths().items()}
    assert found["vision.trunk.stem.0.weight"] == 0
    deepest = max(layer for name, layer in found.items() if name.startswith("vision"))
    assert found["vision.projection.weight"] == deepest and len(set(found.values())) > 4


def test_layer_decay_of_one_tower_leaves_the_other_alone():
    mixture = base.Mixture(tiny.model(), {})
    config = optim.Config(layer_decay={"vision": 0.5})
    scales = {id(p): group["lr_scale"] for group in optim.groups(mixture, config) for p in group["params"]}
    named = {name: scales[id(p)] for name, p in mixture.model.named_parameters()}
    assert named["vision.trunk.cls_token"] == 0.125 and named["vision.trunk.blocks.0.norm1.weight"] == 0.25
    assert named["vision.projection.weight"] == named["text.token_embedding.weight"] == named["logit_scale"] == 1


@pytest.mark.parametrize("section", [tiny.vit_section, tiny.conv_section])
def test_a_locked_tower_trains_its_last_blocks(section):
    made = section()
    made.vision.frozen, made.vision.unlocked_blocks = True, 1
    made.text.frozen, made.text.unlocked_blocks = True, 1
    model = tiny.model(made)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    block = "vision.trunk.blocks.1." if section is tiny.vit_section else "vision.trunk.stages.3.blocks."
    assert any(name.startswith(block) for name in trained)
    assert {"vision.projection.weight", "text.norm.weight", "text.projection.weight", "logit_scale"} <= trained
    assert not any(
        name.startswith(("vision.trunk.patch", "vision.trunk.stem", "text.token", "text.blocks.0")) for name in trained
    )
    assert not model.vision.trunk.training and next(iter(model.vision._open)).training
    model.eval()
    assert not any(m.training for m in model.modules())


def test_a_locked_tower_has_no_gradient_where_it_is_locked():
    made = tiny.vit_section()
    made.vision.frozen, made.vision.unlocked_blocks = True, 1
    model = tiny.model(made)
    encodings = model(tiny.batch())
    (encodings.image.sum() + encodings.text.sum()).backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, p in model.named_parameters() if p.requires_grad} - {"logit_scale"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"vision": {"unlocked_blocks": 1}}, "set frozen=true"),
        ({"text": {"unlocked_blocks": 1}}, "set frozen=true"),
    ],
)
def test_open_blocks_of_a_tower_that_is_not_locked_are_refused(tree, words):
    with pytest.raises(ConfigError, match=words):
        build(vlm.Config, tree)


def test_more_open_blocks_than_there_are_is_refused():
    made = tiny.vit_section()
    made.vision.frozen, made.vision.unlocked_blocks = True, 5
    with pytest.raises(ConfigError, match="5 blocks, the tower has 2"):
        tiny.model(made)
    assert torch.is_grad_enabled()

"""Classes shared among ranks give the features and the gradient of one rank that encodes them all."""

import pytest
import torch
from torch.nn import functional as F

from finetune.layers.class_shards import over_ranks
from finetune.layers.sentences import Sentences
from pretrain import config, dist, pretrained, registry
from tests import tiny

NAMES = ["red circle", "blue square", "green ring", "one star", "two moons"]


def gradient(model: str, method: str, section: dict, rows: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return class features, the mean over ranks of the gradients of their own pictures, and the prompts encoded."""
    loaded = pretrained.load(model)
    plug = registry.find("finetune.methods", method)
    torch.manual_seed(0)
    made = plug.Method(config.build(plug.Config, {"name": method, **section}), loaded, NAMES)
    loaded.model.text.double()
    made.double()
    seen = []
    loaded.model.text.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    share = rows // dist.world()
    image_NE = F.normalize(torch.randn(rows, 16, dtype=torch.double), dim=-1)
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    classes_KE = made.classes()
    loss = F.cross_entropy(5 * image_NE[own] @ classes_KE.T.double(), (torch.arange(rows) % len(NAMES))[own])
    loss.backward()
    grads = {name: dist.mean(p.grad) for name, p in made.trained().items() if p.grad is not None}
    return classes_KE.detach(), grads, sum(seen)


@pytest.mark.parametrize(
    ("method", "section"),
    [
        ("coop", {"length": 4}), ("coop", {"length": 4, "per_class": True}), ("coop", {"length": 4, "chunk": 2}),
        ("lora", {"towers": "text", "dropout": 0, "templates": ["a {}", "the {}."]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("world", [2, 3])
def test_shared_classes_are_those_of_one_rank(method, section, world, tmp_path, ranks):
    model = str(tiny.export(tmp_path / "export"))
    [(want_KE, wanted, all_of_them)] = ranks.run(1, gradient, model, method, section, 6)
    for got_KE, grads, encoded in ranks.run(world, gradient, model, method, section, 6):
        torch.testing.assert_close(got_KE, want_KE, rtol=0, atol=1e-6)  # the towers' results are float32
        assert grads.keys() == wanted.keys() and grads
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-6)
        assert encoded * len(NAMES) == all_of_them * -(-len(NAMES) // world)


def frozen(model: str) -> tuple[torch.Tensor, int]:
    """Return the class features of a text tower that does not change, asked for twice, and the sentences encoded."""
    loaded, seen = pretrained.load(model), []
    loaded.model.text.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    made = Sentences(loaded, NAMES, ["a {}", "the {}."], frozen=True)
    first_KE = made(loaded.model.text)
    assert made(loaded.model.text) is first_KE and not first_KE.requires_grad
    return first_KE, sum(seen)


@pytest.mark.parametrize("world", [2, 3])
def test_sentences_of_a_frozen_tower_are_shared_too(world, tmp_path, ranks):
    model = str(tiny.export(tmp_path / "export"))
    [(want_KE, all_of_them)] = ranks.run(1, frozen, model)
    for got_KE, encoded in ranks.run(world, frozen, model):
        torch.testing.assert_close(got_KE, want_KE, rtol=0, atol=1e-6)
        assert encoded == 2 * -(-len(NAMES) // world) < all_of_them


def test_fewer_classes_than_ranks_are_encoded_by_all(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 4)
    assert over_ranks(lambda own_k: own_k[:, None].float(), 3).tolist() == [[0], [1], [2]]

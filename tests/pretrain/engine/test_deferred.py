"""A model built in parts has the bits of one built whole, trains alike, and its ranks never hold it whole."""

import ctypes
import gc
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from pretrain import dist
from pretrain.config import ConfigError, build
from pretrain.engine import deepspeed_config, deferred, zero
from pretrain.models import text
from tests.pretrain.engine import test_large_models as large
from tests.pretrain.memory_of_runs import resident

TOWERS = [
    "vit_base_patch32_clip_224",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_resnet",
    pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    pytest.param("efficientnet_lite0", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_equal_to_the_bit(name):
    args = {"depth": 2} if name.startswith("vit_base") else {}
    torch.manual_seed(3)
    whole, after = timm.create_model(name, **args), torch.rand(2)
    torch.manual_seed(3)
    with deferred.recording() as record:
        parts = timm.create_model(name, **args)
    assert all(p.is_meta for p in parts.parameters())
    order: list[nn.Parameter] = []
    deferred.materialise(parts, record, order.append)
    assert torch.equal(torch.rand(2), after)
    assert {id(p) for p in order} == {id(p) for p in parts.parameters()} and len(order) == len(list(whole.parameters()))
    for found, expected in (
        (parts.named_parameters(), whole.named_parameters()),
        (parts.named_buffers(), whole.named_buffers()),
    ):
        found = dict(found)
        for key, value in expected:
            assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key
            assert found[key].requires_grad == value.requires_grad


def native(width: int = 32, layers: int = 2) -> nn.Module:
    return text.NativeText(
        text.Config(width=width, layers=layers, heads=2, vocab_size=60, context_length=9, frozen=True), 8, end=59
    )


def test_a_parameter_may_be_emptied_as_soon_as_it_is_made():
    torch.manual_seed(1)
    whole = native()
    torch.manual_seed(1)
    with deferred.recording() as record:
        parts = native()
    kept = {}

    def take(p: nn.Parameter) -> None:
        kept[id(p)] = p.detach().clone()
        p.data = torch.empty(0)

    deferred.materialise(parts, record, take)
    frozen = {name: p.requires_grad for name, p in whole.named_parameters()}
    for name, p in parts.named_parameters():
        assert torch.equal(kept[id(p)], whole.get_parameter(name)) and p.requires_grad == frozen[name]


class Odd(nn.Module):
    """Ties, reads and views: what initialisations do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        nn.init.orthogonal_(self.a.weight)
        self.c = nn.Parameter(torch.empty(4, 3))
        nn.init.normal_(self.c)
        self.c.data[1:3].zero_()
        self.d = nn.Parameter(self.c.detach().clone() * 2)
        self.c.data.copy_(torch.ones(4, 3))
        self.e = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("f", torch.arange(3))
        self.register_buffer("g", torch.zeros(3) + 1)
        nn.init.kaiming_normal_(self.b.weight[:2])


def test_ties_views_and_reads_are_kept():
    torch.manual_seed(2)
    whole = Odd()
    torch.manual_seed(2)
    with deferred.recording() as record:
        parts = Odd()
    deferred.materialise(parts, record, lambda p: None)
    assert parts.a.weight is parts.b.weight
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())


class Looks(nn.Module):
    """Decides by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2))
        if self.a.sum().item() > 1:
            self.b = nn.Parameter(torch.ones(2))


class Redraws(nn.Module):
    """torch draws again what lies outside, so how often depends on what was drawn (since 2.14)."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.trunc_normal_(nn.Parameter(torch.empty(4)))
        raise RuntimeError("older releases: meta tensors are no trouble")


class Draws(nn.Module):
    """Draws data that is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(3, device="cpu").tolist()


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Looks, "cannot be built in parts"), (Redraws, "cannot be built in parts"), (Draws, "draws aten.randperm")],
)
def test_what_cannot_be_built_in_parts_is_refused(kind, words):
    with pytest.raises(ConfigError, match=words), deferred.recording():
        kind()
    with pytest.raises(ConfigError, match=r"needs zero.stage=3"):
        build(zero.Config, {"init": "parts"})


def trained(init: str, offload: str = "none", **towers) -> list[float]:
    """Run on every rank: three steps at stage 3."""
    keys = {"init": init, "offload": offload}
    if init == "whole":
        return large.run(3, keys=keys, **towers)
    dist.seed_step(0, "tiny")
    with deferred.recording() as record:
        module = large.mixture(**towers)
    made = large.engine(3, module=module, keys=keys, record=record)
    try:
        assert {g["name"] for g in made.torch_optimizer.param_groups} == {"all, decayed", "all, not decayed"}
        return large.steps(made)
    finally:
        made.close()


@pytest.mark.slow
@large.recomputes_frozen
@pytest.mark.parametrize("offload", ["none", "all"])
def test_it_trains_as_one_built_whole(ranks, offload):
    towers = {"vision_frozen": True, "vision_unlocked_blocks": 1, "vision_checkpointing": True}
    for world in (1, 2):
        whole = ranks.run(world, trained, "whole", offload, **towers)
        assert ranks.run(world, trained, "parts", offload, **towers) == whole


def peak(init: str) -> tuple[int, int]:
    """Run on every rank: return how far resident memory grows while a model is built, and the model's bytes."""
    tree = deepspeed_config.deepspeed_config(zero.Config(stage=3), rows=1, grad_clip=1.0, trained=10**8)
    size = dict(width=512, layers=16)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls of this rank gave back would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    torch.manual_seed(0)
    if init == "whole":
        module = native(**size)
    else:
        with deferred.recording() as record:
            module = native(**size)
        deferred.shard(module, record, tree)
    grown = resident("VmHWM") - before
    return grown, 4 * sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def test_ranks_never_hold_the_whole(ranks):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is read from Linux's /proc")
    ranks.run(2, trained, "parts")  # what the first use allocates
    for grown, size in ranks.run(2, peak, "parts"):
        assert size > 2e8 and grown < 0.65 * size, (grown, size)  # a half, and one parameter


def test_a_whole_build_holds_the_whole(ranks):
    grown, size = ranks.run(1, peak, "whole")[0]
    assert grown > 0.95 * size

"""What makes large models fit changes no loss: recomputed blocks, patch dropout, locked towers at every ZeRO stage."""

import dataclasses
from contextlib import nullcontext

import deepspeed
import pytest
import torch
from packaging.version import Version

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.engine import accumulate, deepspeed_config, zero
from pretrain.models import blocks
from pretrain.objectives import base, contrastive
from tests import tiny
from tests.pretrain.engine.test_zero import engine

NO_DROPOUT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}


def mixture(**keys) -> base.Mixture:
    """Return towers of three blocks; keys: `vision_KEY` and `text_KEY` of their sections."""
    section = tiny.vit_section(depth=3, proj_drop_rate=0.1)
    section.text.layers = 3
    for key, value in keys.items():
        tower, _, name = key.partition("_")
        setattr(getattr(section, tower), name, value)
    return base.Mixture(tiny.model(section), {"contrastive": contrastive.Objective(contrastive.Config())})


def rows(step: int) -> Batch:
    """Return this rank's rows of a step."""
    whole = dataclasses.replace(tiny.batch(8, seed=step), draw_B=torch.arange(8) + 100 * step)
    return whole.split(8 // dist.world())[dist.rank()]


def steps(made: zero.Engine, count: int = 3) -> list[float]:
    """Return the global losses of the first steps."""
    losses = []
    for step in range(count):
        dist.seed_step(0, step, dist.rank())
        loss, _ = made([rows(step)])
        made.backward(loss)
        made.step(0.01)
        losses.append(dist.mean(loss).item())
    return losses


def run(stage: int, precision: str = "fp32", keys: dict | None = None, compiled: bool = False, **towers) -> list[float]:
    """Run on every rank: three steps."""
    module = mixture(**towers)
    if compiled:
        assert blocks.compile_all(module) == 6
    made = engine(stage, precision, module=module, keys=keys)
    try:
        return steps(made)
    finally:
        made.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_blocks_change_no_loss(ranks, stage):
    plain = ranks.run(2, run, stage)[0]
    lean = ranks.run(2, run, stage, vision_checkpointing=True, text_checkpointing=2)[0]
    assert lean == plain


def locked(stage: int) -> list[float]:
    """Run on every rank: a locked tower with one open block, patch dropout, recomputation, all at once."""
    module = mixture(
        vision_frozen=True,
        vision_unlocked_blocks=1,
        vision_patch_dropout=0.5,
        vision_checkpointing=True,
        text_frozen=True,
    )
    shut = {name for name, p in module.named_parameters() if not p.requires_grad}
    made = engine(stage, module=module)
    try:
        before = {(f.name, f.start): f.weight.clone() for f in made.fragments()}
        losses = steps(made)
        for f in made.fragments():
            same = torch.equal(f.weight, before[f.name, f.start])
            assert same == (f.name in shut), f.name
            assert bool(f.moments) == (f.name not in shut), f.name
        assert all(p.grad is None for name, p in module.named_parameters() if name in shut)
        assert any(name.endswith("blocks.1.mlp.fc1.weight") for name in shut)
        held = sum(s["exp_avg"].numel() for s in made.torch_optimizer.state.values())
        trained = sum(getattr(p, "ds_numel", p.numel()) for n, p in module.named_parameters() if n not in shut)
        assert held * (dist.world() if stage else 1) <= trained + 64 * 4, "a frozen weight has moments"
        return losses
    finally:
        made.close()


#: what older ones are refused
recomputes_frozen = pytest.mark.skipif(
    Version(deepspeed.__version__) < deepspeed_config.RECOMPUTES_FROZEN,
    reason=f"before {deepspeed_config.RECOMPUTES_FROZEN}, stage 3 cannot compute blocks with frozen weights again",
)


@pytest.mark.parametrize(
    ("stage", "version", "refused"), [(3, "0.19.7", True), (3, "0.19.8", False), (2, "0.17.5", False)]
)
def test_an_old_deepspeed_that_would_lose_frozen_weights_is_refused(stage, version, refused):
    module = mixture(vision_frozen=True, vision_unlocked_blocks=1, vision_checkpointing=True)
    with pytest.raises(ConfigError, match="cannot compute blocks again") if refused else nullcontext():
        deepspeed_config.refuse_lost_shapes(module, stage, version)
    deepspeed_config.refuse_lost_shapes(mixture(vision_checkpointing=True), stage, version)


@recomputes_frozen
def test_locked_towers_stay_to_the_bit_at_every_stage(ranks):
    first, *others = [ranks.run(2, locked, stage)[0] for stage in range(4)]
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-5)


def test_patch_dropout_draws_the_same_on_any_number_of_ranks(ranks):
    keys = {"vision_patch_dropout": 0.5, "vision_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}}
    one, two = ranks.run(1, run, 0, **keys)[0], ranks.run(2, run, 3, **keys)[0]
    assert two == pytest.approx(one, rel=1e-5)


def scale_in_half(stage: int, precision: str) -> None:
    """The temperature is used in fp32, and so are the features that the loss sees."""
    made = engine(stage, precision, module=mixture())
    try:
        seen = {}
        objective = made.module.objectives["contrastive"]
        inner = objective.loss_from_features

        def spy(model, features):
            seen.update(features, scale=model.scale.detach(), exact=model.logit_scale.detach().clone())
            return inner(model, features)

        objective.loss_from_features = spy
        assert all(torch.isfinite(torch.tensor(steps(made))))
        floats = {name: value.dtype for name, value in seen.items() if value.is_floating_point()}
        assert set(floats) >= {"scale", "exact", "image", "text"} and set(floats.values()) == {torch.float32}
        assert torch.equal(seen["scale"], seen["exact"].exp())
        assert made.module.model.vision.projection.weight.dtype == torch.float32
        assert all(f.weight.dtype == torch.float32 for f in made.fragments())
    finally:
        made.close()


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp16")])
def test_scalars_are_fp32_in_half_precision(ranks, stage, precision):
    ranks.run(2, scale_in_half, stage, precision)


@pytest.mark.slow  # the compiler takes most of it
@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks_change_no_loss(ranks, stage):
    plain = ranks.run(2, run, stage, vision_args=NO_DROPOUT)[0]
    fast = ranks.run(2, run, stage, compiled=True, vision_args=NO_DROPOUT, text_checkpointing=True)[0]
    assert fast == pytest.approx(plain, rel=1e-5)


def in_micro_batches(stage: int, rows_at_once: int | None) -> list[float]:
    """Run on every rank: recomputed blocks and patch dropout, in micro-batches or in whole ones."""
    made = engine(
        stage,
        module=mixture(
            vision_args=NO_DROPOUT, vision_checkpointing=True, text_checkpointing=2, vision_patch_dropout=0.5
        ),
    )
    try:
        gradients = accumulate.Steps(made, rows=rows_at_once, seed=0)
        losses = []
        for step in range(2):  # later Adam blows up the rounding of gradients that are truly zero (a key's bias)
            _, loss = gradients(rows(step), step, lambda loss: dist.mean(loss.detach()).item())
            made.step(0.01)
            losses.append(loss)
        return losses
    finally:
        made.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_of_recomputed_blocks_are_the_whole_batch(ranks, stage):
    whole = ranks.run(2, in_micro_batches, stage, None)[0]
    assert ranks.run(2, in_micro_batches, stage, 2)[0] == pytest.approx(whole, rel=1e-5)

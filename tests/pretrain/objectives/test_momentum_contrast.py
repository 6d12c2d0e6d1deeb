"""ALBEF's contrast: a plain loop of its formulas; ranks, micro-batches and stages; resumption; locked towers; plans."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from pretrain import config, dist, pretrained
from pretrain import recipe as recipes
from pretrain.batch import Batch
from pretrain.engine import accumulate, checkpoint, optim, rollback, share, zero
from pretrain.models import text, vision
from pretrain.models.momentum import MomentumTowers
from pretrain.models.vlm import Encodings
from pretrain.objectives import base, contrastive, momentum_contrast
from pretrain.planning import rehearsal
from pretrain.recipe import Recipe
from tests import tiny
from tests.end_to_end.jobs import losses, pretrain
from tests.pretrain.engine.test_accumulate import Alone
from tests.pretrain.models import fused

ROWS, STEPS, RATE = 12, 4, 0.5
SECTION = {"momentum": 0.9, "alpha": 0.4, "ramp": 2, "queue": 30}


def model(**keys: object) -> nn.Module:
    """Return a tiny model at a temperature that keeps gradients of order one."""
    section = tiny.vit_section()
    section.logit_scale = 1.5
    for key, value in keys.items():
        setattr(section.vision, key, value)
    return tiny.model(section)


def mixture(of: nn.Module | None = None, **keys: object) -> base.Mixture:
    """Return a model under the objective."""
    section = momentum_contrast.Config(**{**SECTION, **keys})
    return base.build({"momentum_contrast": section}, of or model())


def objective(module: base.Mixture) -> momentum_contrast.Objective:
    """Return the mixture's only objective."""
    return module.objectives["momentum_contrast"]


def rows(step: int, *, double: bool = True) -> Batch:
    """Return this rank's rows of a step; two captions occur twice in it, one was in the step before, too."""
    whole = tiny.batch(ROWS, seed=step)
    whole.caption_B[7], whole.caption_B[10] = whole.caption_B[0], whole.caption_B[4]
    whole.caption_B[2] = 1000 * (step - 1) + 3 if step else 3
    if double:
        whole.image_NCHW = whole.image_NCHW.double()
    return whole.split(ROWS // dist.world())[dist.rank()]


def descend(module: nn.Module, grads: dict[str, Tensor]) -> None:
    """Go a step down the gradient."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p -= RATE * grads[name]


def sides(of: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return unit-norm features of a model."""
    found = Encodings(of, batch)
    return found.image, found.text


def plain(section: momentum_contrast.Config) -> tuple[list[float], nn.Module, list[tuple[Tensor, Tensor, Tensor]]]:
    """Train on whole batches as section 3.2 of the paper says; return losses, the last copy and the queue's steps."""
    of, found, queue = model().double(), [], []
    trailing = copy.deepcopy(of)
    for step in range(STEPS):
        batch, captions = rows(step), rows(step).caption_B
        with torch.no_grad():
            for ours, p in zip(trailing.parameters(), of.parameters()):
                ours.copy_(section.momentum * ours + (1 - section.momentum) * p)
            own = sides(trailing, batch)
        queue = [(*own, captions), *queue]
        images, texts, same = (torch.cat(parts) for parts in zip(*queue))
        images, texts, same = (t[: ROWS + section.queue] for t in (images, texts, same))
        hard = (captions[:, None] == same).double()
        hard = hard / hard.sum(1, keepdim=True)
        alpha = section.alpha * min(1, step / section.ramp)
        loss = torch.zeros(())
        for x, mine, keys in zip(sides(of, batch), own, (texts, images)):
            soft = (of.scale.detach() * mine @ keys.T).softmax(1)
            loss = loss + F.cross_entropy(of.scale * x @ keys.T, (1 - alpha) * hard + alpha * soft) / 2
        names = [name for name, _ in of.named_parameters()]
        grads = torch.autograd.grad(loss, list(of.parameters()), allow_unused=True)
        descend(of, {n: torch.zeros(()) if g is None else g for n, g in zip(names, grads)})
        found.append(loss.item())
    return found, trailing, queue


def ours(micro: int | None, *, recomputed: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Train as the trainer does, in float64; return the global losses, the weights and all buffers."""
    with mock.patch.object(Tensor, "float", Tensor.double):  # what lifts half precision must not lower this
        module = mixture(model(checkpointing=recomputed)).double()
        run, found = accumulate.Steps(Alone(module), rows=micro, seed=5), []
        for step in range(STEPS):
            module.zero_grad()
            _, loss = run(rows(step), step, lambda loss: loss.detach())
            found.append(dist.mean(loss).item())
            pairs = module.model.named_parameters()
            descend(module.model, {n: dist.mean(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in pairs})
        return found, {**dict(module.named_parameters()), **share.buffers(module)}


@pytest.fixture
def in_double() -> Iterator[None]:
    """What lifts half precision does not lower double."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        yield


def agree(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    """Losses, weights, copies and queues are the same."""
    assert found[0] == pytest.approx(expected[0], rel=1e-11)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert (found[1][name] - value).detach().abs().max() <= 1e-10 * max(1.0, float(value.detach().abs().max())), (
            name
        )


@pytest.fixture(scope="module")
def whole() -> tuple[list[float], dict[str, Tensor]]:
    """Four steps of one rank, its batch whole."""
    return ours(None)


def test_it_is_the_papers_loop(whole, in_double: None) -> None:
    expected, trailing, queue = plain(momentum_contrast.Config(**SECTION))
    assert len(set(expected)) == STEPS
    found, state = whole
    assert found == pytest.approx(expected, rel=1e-12)
    prefix = "objectives.momentum_contrast."
    for name, value in trailing.named_parameters():
        if not name.startswith("logit"):
            torch.testing.assert_close(state[f"{prefix}copy.{name}"], value.detach(), rtol=0, atol=1e-12)
    for name, value in zip(("image_QE", "text_QE", "caption_Q"), map(torch.cat, zip(*queue))):
        torch.testing.assert_close(state[prefix + name], value[: SECTION["queue"]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, None), (2, 2), (3, None)])
def test_neither_ranks_nor_micro_batches_matter(ranks, whole, world, micro) -> None:
    for found in ranks.run(world, ours, micro):
        agree(found, whole)


def test_what_is_computed_again_neither_moves_the_copy_nor_joins_the_queue(whole) -> None:
    agree(ours(None, recomputed=True), whole)


def test_the_copy_is_a_moving_average() -> None:
    dist.seed_step("moves")
    of = model().double()
    copied, expected = MomentumTowers(of).double(), {}
    for step, momentum in enumerate((0.0, 0.9, 0.9)):
        with torch.no_grad():
            for p in of.parameters():
                p += 0.1 * torch.randn_like(p)
        copied.follow(of, momentum)
        for name, p in of.named_parameters():
            expected[name] = p.detach().clone() if not step else 0.9 * expected[name] + (1 - 0.9) * p.detach()
    assert not list(copied.parameters()) and not copied.train().training
    for name, value in dict(copied.named_buffers()).items():
        if name in expected:
            torch.testing.assert_close(value, expected.pop(name), rtol=0, atol=1e-12)
    assert list(expected) == ["logit_scale"]


def test_without_memory_it_is_the_contrastive_loss(in_double: None) -> None:
    """With m = 0, a = 0 and no queue, keys are the features without their gradient; the temperature's is the same."""
    module = mixture(momentum=0.0, alpha=0.0, queue=0).double()
    other = base.build({"contrastive": contrastive.Config()}, module.model)
    loss, expected = module([rows(1)])[0], other([rows(1)])[0]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    scale = module.model.logit_scale
    [found], [full] = (torch.autograd.grad(x, scale, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(found, full, rtol=0, atol=1e-12)
    image, text = sides(module.model, rows(1))
    same = rows(1).caption_B[:, None] == rows(1).caption_B
    target = same.double() / same.sum(1, keepdim=True)
    forth = F.cross_entropy(module.model.scale * image @ text.detach().T, target)
    back = F.cross_entropy(module.model.scale * text @ image.detach().T, target)
    grads = torch.autograd.grad((forth + back) / 2, list(module.parameters()), allow_unused=True)
    for grad, p in zip(grads, module.parameters()):
        mine = torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0]
        assert (grad is None) == (mine is None)
        if grad is not None:
            torch.testing.assert_close(mine, grad, rtol=0, atol=1e-11)


def test_a_step_that_is_not_made_is_forgotten() -> None:
    module = mixture()
    run = accumulate.Steps(Alone(module), rows=None, seed=5)
    run(rows(0, double=False), 0, lambda loss: None)
    kept = rollback.Buffers(module)
    before = {name: value.clone() for name, value in share.buffers(module).items()}
    run(rows(1, double=False), 1, lambda loss: None)
    assert not torch.equal(objective(module).caption_Q, before["objectives.momentum_contrast.caption_Q"])
    kept.put_back()
    assert all(torch.equal(value, before[name]) for name, value in share.buffers(module).items())


def stepped(stage: int, micro: int | None) -> tuple[list[float], dict[str, Tensor]]:
    """Return the global losses of four steps under DeepSpeed, and this rank's buffers."""
    module = mixture()
    made = zero.Engine(
        module,
        zero.Config(stage=stage),
        optim_config=optim.Config(optimizer="sgd", lr=RATE, grad_clip=0.0),
        precision="fp32",
        rows=ROWS // dist.world(),
        device=torch.device("cpu"),
    )
    try:
        run, found = accumulate.Steps(made, rows=micro, seed=5), []
        for step in range(STEPS):
            _, loss = run(rows(step, double=False), step, lambda loss: loss.detach())
            made.step(RATE)
            found.append(dist.mean(loss).item())
        return found, {name: value.clone() for name, value in share.buffers(module).items()}
    finally:
        made.close()


@pytest.fixture(scope="module")
def at_stage_0(ranks) -> tuple[list[float], dict[str, Tensor]]:
    """Four steps of two ranks, at stage 0."""
    return ranks.run(2, stepped, 0, None)[0]


@pytest.mark.parametrize(("stage", "micro"), [(1, None), (2, 3), (3, None), (3, 3)])
def test_every_stage_takes_the_same_steps(ranks, at_stage_0, stage, micro) -> None:
    first, second = ranks.run(2, stepped, stage, micro)
    assert first[0] == pytest.approx(at_stage_0[0], rel=2e-5)
    for name, value in at_stage_0[1].items():
        assert torch.equal(first[1][name], second[1][name]), "all ranks hold the same copy and queue"
        torch.testing.assert_close(first[1][name], value, rtol=0, atol=2e-4)


WORDS = ("objectives={momentum_contrast: {queue: 40, ramp: 2, momentum: 0.9}}", "evals={}")


def test_a_run_goes_on_with_the_same_bits(ranks, tmp_path: Path) -> None:
    """Of a run, what its last two steps left is taken away; the same command makes the same again."""
    file, run = tiny.config_file(tmp_path), tmp_path / "runs/tiny"
    assert ranks.run(2, pretrain, file, *WORDS) == [0, 0]
    expected, told = checkpoint.read_weights(run / "checkpoints/step-00000004"), losses(run)
    assert any(name.endswith("caption_Q") for name in expected)
    shutil.rmtree(run / "checkpoints/step-00000004")
    (run / "checkpoints/latest").unlink()
    assert ranks.run(2, pretrain, file, *WORDS) == [0, 0]
    found = checkpoint.read_weights(run / "checkpoints/step-00000004")
    assert losses(run) == told
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    names = set(pretrained.load(run).model.state_dict())
    assert not [name for name in names if "copy" in name or "queue" in name.lower()], "the copy is no part of a model"
    # built shard by shard, the model and what trails it are the same
    parts = (*WORDS, "run.name=parts", "zero.stage=3", "zero.init=parts")
    assert ranks.run(2, pretrain, file, *parts) == [0, 0]
    assert list(losses(tmp_path / "runs/parts").values()) == pytest.approx(list(told.values()), rel=1e-5)


def test_a_locked_picture_tower_is_not_copied() -> None:
    """Keys of a whole copy are the same: the trunk does not move."""
    locked = mixture(model(frozen=True))
    assert not [name for name in share.buffers(objective(locked)) if "trunk" in name]
    copied = objective(locked).copy
    whole = copy.deepcopy(locked.model)
    batch = rows(0, double=False)
    locked([batch])[0].backward()
    with torch.no_grad():
        locked.model.vision.projection.weight += 0.1
        whole.vision.projection.weight.mul_(0.9).add_(locked.model.vision.projection.weight, alpha=0.1)
    copied.follow(locked.model, 0.9)
    for found, expected in zip(copied.sides(locked.model(batch)), sides(whole, batch)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    cached = copy.copy(batch)
    cached.image_NE = F.normalize(torch.randn(ROWS, 16), dim=1)
    assert torch.equal(copied.sides(locked.model(cached))[0], cached.image_NE)


def test_running_statistics_are_taken_as_they_are() -> None:
    section = tiny.vit_section()
    section.vision = vision.Config(name="test_efficientnet", image_size=32)
    of = tiny.model(section)
    copied = MomentumTowers(of)
    of(tiny.batch()).image.sum().backward()
    copied.follow(of, 0.0)
    with torch.no_grad():
        found, expected = copied.sides(of(tiny.batch())), sides(of.eval(), tiny.batch())
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_an_encoder_of_transformers_is_copied(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=tiny.VOCABULARY, **size), add_pooling_layer=False).save_pretrained(tmp_path)
    section = tiny.vit_section()
    section.text = text.Config(name=f"hf:{tmp_path}", context_length=12, vocab_size=tiny.VOCABULARY)
    of = tiny.model(section).eval()
    copied = MomentumTowers(of)
    copied.follow(of, 0.0)
    assert not list(copied.parameters())
    torch.testing.assert_close(copied.sides(of(tiny.batch()))[1], of(tiny.batch()).text)


@pytest.mark.parametrize("kind", ["cross", "coca"])
def test_models_that_fuse_have_it_too(kind: str) -> None:
    module = mixture(fused.model(kind).float(), ramp=0)
    loss, logs = module([fused.single(fused.batch())])
    loss.backward()
    assert loss.isfinite() and logs["momentum_contrast/alpha"] == pytest.approx(0.4)
    assert not [name for name in share.buffers(module) if ".fusion." in name], "what fuses is not copied"


def test_a_plan_counts_the_copy_and_the_queue(tmp_path: Path) -> None:
    file = tiny.config_file(tmp_path)
    steps = {}
    for words in ((), WORDS):
        recipe = config.load(Recipe, file, words)
        words_of = tiny.pretrained_model(recipe.model).tokenizer
        steps[words] = rehearsal.rehearse(recipe, recipes.vocabulary(words_of), rows=8, length=9)
    bare, ours = steps[()], steps[WORDS]
    towers = sum(bare.parts.values())
    assert ours.trained == bare.trained
    assert ours.buffers - bare.buffers == pytest.approx(4 * towers + 40 * (2 * 4 * 16 + 8), rel=0.01)
    assert ours.flops > 1.2 * bare.flops

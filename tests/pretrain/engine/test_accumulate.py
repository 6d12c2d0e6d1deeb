"""Micro-batches give the gradient, the loss and the scalars of the whole batch, at every ZeRO stage."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from pretrain import dist, registry
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.engine import accumulate, optim, zero
from pretrain.engine.steps import Config as Train
from pretrain.objectives import base
from tests import tiny
from tests.pretrain.engine.tiny_module import Tiny
from tests.pretrain.engine.tiny_module import batch as tiny_batch

ROWS = 16


class WordCount(base.Objective):
    """An objective that is a sum over tokens, with draws: predict a number from text features, on tokens that count."""

    needs = ("text",)

    def __init__(self, config: base.Config) -> None:
        super().__init__(config)
        dist.seed_step("word count")
        self.line = nn.Linear(16, 1)

    def prepare(self, batch: Batch, step: int) -> base.Prepared:
        """Count a different number of tokens in each row."""
        drawn_BT = (batch.tokens_BT * 7 + step) % 3 > 0
        return base.Prepared({"counts": drawn_BT}, drawn_BT.sum().float())

    def forward(self, encodings, prepared: base.Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error a counted token."""
        error_BT = (self.line(encodings.text) - encodings.batch.tokens_BT / 32).square()
        loss = (error_BT * prepared.draws["counts"]).sum() / prepared.count
        return loss, {"bias": self.line.bias.reshape(())}


def mixture(names: list[str], **vision: object) -> base.Mixture:
    """Return a tiny model under the named objectives, with a bias where the sigmoid loss reads one.

    Its temperature keeps gradients of order one: at CLIP's, two float32 gradients of this model differ by 5e-6 already.
    """
    section = tiny.vit_section(**vision)
    section.logit_scale = 0.5
    section.logit_bias = -3.0 if "sigmoid" in names else None
    made = {n: registry.find("pretrain.objectives", n) for n in names if n != "words"}
    objectives = {n: plug.Objective(plug.Config(weight=0.7)) for n, plug in made.items()}
    if "words" in names:
        objectives["words"] = WordCount(base.Config(weight=1.3))
    return base.Mixture(tiny.model(section), objectives)


def rows_of_rank(seed: int) -> Batch:
    """Return this rank's rows of a global batch in which two captions occur twice."""
    whole = tiny.batch(ROWS, seed=seed)
    whole.caption_B[ROWS // 2 + 1], whole.caption_B[3] = whole.caption_B[0], whole.caption_B[2]
    return whole.split(ROWS // dist.world())[dist.rank()]


def engine(module: nn.Module, stage: int, precision: str = "fp32") -> zero.Engine:
    """Return an engine that changes weights little and does not clip."""
    return zero.Engine(
        module,
        zero.Config(stage=stage),
        optim_config=optim.Config(lr=1e-3, grad_clip=0.0),
        precision=precision,
        rows=ROWS // dist.world(),
        device=torch.device("cpu"),
    )


def averaged(made: zero.Engine) -> dict[str, Tensor]:
    """Return the gradients that the optimizer will see, whole, unscaled, by name."""
    from deepspeed.utils import safe_get_full_grad

    scale = made.loss_scale.scale if made.loss_scale else 1.0
    grads = {name: (p.grad if made.stage == 0 else safe_get_full_grad(p)) for name, p in made.module.named_parameters()}
    return {name: grad.detach().clone() / scale for name, grad in grads.items() if grad is not None}


def one_step(names: list[str], stage: int, rows: int | None, precision: str = "fp32", **vision: object):
    """Return loss, scalars, gradients and norm of the second of two steps, the first of which leaves its traces."""
    made = engine(mixture(names, **vision), stage, precision)
    if made.loss_scale:
        made.loss_scale.scale = 2.0**8  # fp16 starts at a scale that overflows in its first steps
    try:
        steps = accumulate.Steps(made, rows=rows, seed=5)
        steps(rows_of_rank(1), 0, lambda loss: None)
        made.step(0.0)
        logs, loss = steps(rows_of_rank(2), 1, lambda loss: loss)
        grads, norm = averaged(made), made.step(0.0)
        return dist.mean(loss), {name: dist.mean(value) for name, value in logs.items()}, grads, norm
    finally:
        made.close()


def compared(stage: int, names: list[str], rows: tuple[int, ...], precision: str = "fp32", bound: float = 1e-6) -> None:
    """On every rank: micro-batches of `rows` against the whole batch."""
    loss, logs, grads, norm = one_step(names, stage, None, precision)
    trained = [name for name, p in mixture(names).named_parameters() if p.requires_grad]
    assert sorted(grads) == sorted(trained) and "model.logit_scale" in grads
    for size in rows:
        loss_k, logs_k, grads_k, norm_k = one_step(names, stage, size, precision)
        assert abs(loss_k - loss) <= bound * abs(loss)
        assert norm_k == pytest.approx(norm, rel=10 * bound)
        assert logs_k.keys() == logs.keys()
        for name in logs:
            assert abs(logs_k[name] - logs[name]) <= bound * max(1.0, abs(float(logs[name]))), name
        for name, full in grads.items():
            apart = float((grads_k[name] - full).abs().max())
            assert apart <= bound * max(1.0, float(full.abs().max())), (name, size, apart)
            assert float(full.abs().max()) > 0, name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["contrastive"], id="contrastive"),
        pytest.param(["sigmoid"], id="sigmoid", marks=pytest.mark.slow),
        pytest.param(["contrastive", "words"], id="both", marks=pytest.mark.slow),
    ],
)
def test_every_gradient_is_that_of_the_whole_batch(ranks, stage, names):
    ranks.run(2, compared, stage, names, (4, 2))


def first_gradient(rows: int | None) -> Tensor:
    """Return the gradient of the temperature in the first step of stage 3, when DeepSpeed keeps nothing gathered."""
    made = engine(mixture(["contrastive"]), 3)
    try:
        accumulate.Steps(made, rows=rows, seed=5)(rows_of_rank(1), 0, lambda loss: None)
        return averaged(made)["model.logit_scale"]
    finally:
        made.close()


def test_the_first_step_of_stage_3_loses_nothing(ranks):
    [expected, _] = ranks.run(2, first_gradient, None)
    for found in ranks.run(2, first_gradient, 2):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_too(ranks, precision):
    """The loss scale of fp16 does not come in twice; what is left is the rounding of half precision."""
    ranks.run(2, compared, 2, ["contrastive", "words"], (4,), precision, 0.02)


class Alone:
    """What `Steps` needs of an engine, with plain autograd in any precision."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seen: list[Tensor] = []

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add to the gradients."""
        loss.backward()

    def gathered(self, parameters):
        """Return a context that does nothing."""
        return contextlib.nullcontext()


def in_double(names: list[str], rows: int | None, **vision: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of one step in float64, without DeepSpeed."""
    module = mixture(names, **vision).double()
    batch = rows_of_rank(2)
    batch.image_NCHW = batch.image_NCHW.double()
    _, loss = accumulate.Steps(Alone(module), rows=rows, seed=5)(batch, 1, lambda loss: loss.detach())
    return loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [8, 2])
@pytest.mark.parametrize("names", [["contrastive"], ["words"], ["contrastive", "sigmoid", "words"]], ids="+".join)
def test_exact_in_double_precision(names, rows, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # what lifts half precision must not lower this
    loss, grads = in_double(names, None)
    loss_k, grads_k = in_double(names, rows)
    torch.testing.assert_close(loss_k, loss, rtol=1e-12, atol=0)
    assert grads.keys() == grads_k.keys() and len(grads) > 30
    for name, full in grads.items():
        torch.testing.assert_close(grads_k[name], full, rtol=0, atol=1e-11)


def test_a_list_of_batches_is_one_step():
    """The forward contrasts all rows of a step, whether it comes in one batch or in several."""
    module, batch = mixture(["contrastive", "words"]), rows_of_rank(2)
    whole, logs = module([batch])
    parts, logs_k = module(batch.split(4))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    for name, value in logs.items():
        torch.testing.assert_close(logs_k[name], value, rtol=1e-6, atol=0)


def test_dropout_draws_the_same_masks_at_the_replay():
    """With dropout the pull belongs to the features it was taken from: the loss' gradient along them is exact."""
    module = mixture(["contrastive"], proj_drop_rate=0.5)
    made, seen = Alone(module), []
    kept = module._features
    module._features = lambda encodings: seen.append(kept(encodings)) or seen[-1]
    accumulate.Steps(made, rows=4, seed=5)(rows_of_rank(1), 0, lambda loss: None)
    first, again = seen[:4], seen[4:]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["text"], two["text"])
    assert not torch.equal(first[0]["image"], first[1]["image"])
    seen.clear()
    accumulate.Steps(made, rows=4, seed=6)(rows_of_rank(1), 0, lambda loss: None)
    assert not torch.equal(seen[0]["image"], first[0]["image"]), "the tower has no dropout: this test shows nothing"


class Sometimes(Tiny):
    """A module one of whose layers only works in even steps."""

    even = True

    def features(self, x_BF: Tensor) -> Tensor:
        """Return the features, in odd steps without the first layer's weights."""
        return self.last(self.frozen(torch.tanh(self.norm(self.first(x_BF) if self.even else x_BF.new_ones(11)))))


def idle_layer(stage: int) -> Tensor:
    """Return how far a layer moves in a step that does not use it."""
    made = engine(Sometimes(), stage)
    try:
        steps = accumulate.Steps(made, rows=None, seed=0)
        for made.module.even in (True, False):
            steps(tiny_batch(0, dist.rank(), dist.world()), 0, lambda loss: None)
            grads = averaged(made)
            made.step(0.0)
        return grads.get("first.weight", torch.zeros(())).abs().max()
    finally:
        made.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_step_does_not_use_has_no_gradient_from_the_step_before(ranks, stage):
    assert ranks.run(2, idle_layer, stage) == [0.0, 0.0]


def test_refusals():
    with pytest.raises(ConfigError, match="Tiny takes its batch whole"):
        accumulate.refuse(Tiny())
    module = mixture(["contrastive"])
    module.objectives["contrastive"].whole = True
    with pytest.raises(ConfigError, match=r"objectives\.contrastive cannot be computed in parts"):
        accumulate.refuse(module)
    module = mixture(["contrastive"])
    module.model.vision.extra = nn.BatchNorm2d(3)
    with pytest.raises(ConfigError, match=r"model\.vision\.extra is a batch norm"):
        accumulate.refuse(module)
    with pytest.raises(ConfigError, match=r"5 does not divide the 16 rows of a rank .* try 4"):
        Train(steps=1, batch_size=16, micro_batch_size=5).rows_per_rank()
    assert Train(steps=1, batch_size=16, micro_batch_size=4).rows_per_rank() == 16


def test_a_batch_in_parts_keeps_what_belongs_to_its_rows():
    whole = Batch(
        keys=["a", "b", "c"],
        image_NCHW=torch.arange(4.0).reshape(4, 1, 1, 1),
        owner_N=torch.tensor([0, 0, 1, 2]),
        boxes_K4=torch.arange(8.0).reshape(2, 4),
        box_owner_K=torch.tensor([2, 0]),
        target_B=torch.tensor([7, 8, 9]),
        meta=[{"n": 0}, {"n": 1}, {"n": 2}],
        bad=[{"key": "x"}],
        filler=1,
    )
    first, last = whole.split(2)
    assert first.keys == ["a", "b"] and last.keys == ["c"]
    assert first.image_NCHW.flatten().tolist() == [0, 1, 2] and last.image_NCHW.flatten().tolist() == [3]
    assert first.owner_N.tolist() == [0, 0, 1] and last.owner_N.tolist() == [0]
    assert first.boxes_K4.tolist() == [[4, 5, 6, 7]] and last.box_owner_K.tolist() == [0]
    assert last.target_B.tolist() == [9] and last.meta == [{"n": 2}]
    assert (first.filler, last.filler) == (0, 1) and (len(first.bad), len(last.bad)) == (1, 0)
    assert whole.split(3) == [whole]

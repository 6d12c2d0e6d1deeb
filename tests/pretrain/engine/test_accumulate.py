"""Micro-batches give the gradient, the loss and the scalars of the whole batch, at every ZeRO stage."""

import pytest
import torch
from torch import Tensor, nn

from pretrain import dist, registry
from pretrain.batch import Batch
from pretrain.engine import accumulate, optim, zero
from pretrain.objectives import base
from tests import tiny

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
@pytest.mark.parametrize("names", [["contrastive"], ["sigmoid"], ["contrastive", "words"]], ids="+".join)
def test_every_gradient_is_that_of_the_whole_batch(ranks, stage, names):
    ranks.run(2, compared, stage, names, (4, 2))

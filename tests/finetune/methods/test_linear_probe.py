"""The linear probe solves scikit-learn's problem; which features it sees, and how its C is found."""

import math

import pytest
import torch

from finetune.methods import linear_probe as probe
from pretrain import pretrained
from tests import tiny

sklearn_linear = pytest.importorskip("sklearn.linear_model")
threadpoolctl = pytest.importorskip("threadpoolctl")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(rows: int, *, seed: int, classes: int = 4, width: int = 10, noise: float = 2.0) -> probe.Problem:
    draw = torch.Generator().manual_seed(seed)
    centres_KD = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    target_N = torch.arange(rows) % classes
    return probe.Problem(3.0 + centres_KD[target_N] + noise * torch.randn(rows, width, generator=draw), target_N)


@pytest.mark.check("linear-probe", 1)
@pytest.mark.parametrize("c", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("width", [10, 90])  # fewer and more features than samples
def test_equals_scikit_learn(c, width):
    train = problem(60, seed=0, width=width)
    found = probe.solve(train, 4, c=c)
    theirs = sklearn_linear.LogisticRegression(C=c, max_iter=10000, tol=1e-9)
    with threadpoolctl.threadpool_limits(1):  # its threads wait for each other on a busy machine
        theirs.fit(train.features_ND.double().numpy(), train.target_N.numpy())
    torch.testing.assert_close(found.weight_KD, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-3)
    x_ND = problem(40, seed=1, width=width).features_ND.double()
    ours_NK, want_NK = found.logits(x_ND).softmax(1), torch.from_numpy(theirs.predict_proba(x_ND.numpy()))
    torch.testing.assert_close(ours_NK, want_NK, rtol=0, atol=1e-3)


@pytest.mark.check("linear-probe", 2)
def test_a_start_changes_nothing():
    train = problem(60, seed=0)
    cold = probe.solve(train, 4, c=1.0)
    warm = probe.solve(train, 4, c=1.0, start=probe.solve(train, 4, c=0.01))
    torch.testing.assert_close(cold.weight_KD, warm.weight_KD, rtol=0, atol=2e-4)


@pytest.mark.check("linear-probe", 3)
def test_c_is_the_best_on_validation():
    train, validation = problem(40, seed=0, noise=4.0), problem(80, seed=1, noise=4.0)
    found, exponent, accuracy = probe.search(train, validation, 4, max_iterations=50)
    for other in (-6.0, -2.0, 2.0):
        logits_NK = probe.solve(train, 4, c=10**other, max_iterations=50).logits(validation.features_ND.double())
        assert float((logits_NK.argmax(1) == validation.target_N).double().mean()) <= accuracy
    assert -8 <= exponent <= 8 and found.weight_KD.shape == (4, 10)


@pytest.mark.check("linear-probe", 4)
def test_c_is_searched_over_decades_then_by_halves_of_a_step(monkeypatch):
    tried, real = [], probe.solve

    def solve(*args, c, **keys):
        tried.append(math.log10(c))
        return real(*args, c=c, **keys)

    monkeypatch.setattr(probe, "solve", solve)
    _, best, _ = probe.search(problem(20, seed=0), problem(20, seed=1), 4, max_iterations=3)
    assert tried[:7] == pytest.approx([-6, -4, -2, 0, 2, 4, 6]) and len(tried) == 7 + 2 * probe.HALVINGS
    widths = [right - left for left, right in zip(tried[7::2], tried[8::2])]
    assert widths == pytest.approx([2 * 0.5**n for n in range(probe.HALVINGS)])
    assert min(abs(best - exponent) for exponent in tried) < 1e-6


@pytest.mark.check("linear-probe", 5)
@torch.no_grad()
def test_features_are_those_before_the_projection_or_unit_norm_joint_ones(loaded):
    batch = tiny.batch()
    for features, width, seen_by in (("penultimate", 32, "pooled"), ("joint", 16, "features")):
        made = probe.Method(probe.Config(name="linear_probe", features=features), loaded, ["a", "b"])
        seen_ND = made.features(batch)
        assert seen_ND.shape == (len(batch), width) == (len(batch), made.head.in_features)
        assert made.pictures_by == seen_by
    out = loaded.model.vision(batch.image_NCHW)
    torch.testing.assert_close(seen_ND, torch.nn.functional.normalize(out.image_NE, dim=-1))
    first = probe.Method(probe.Config(name="linear_probe"), loaded, ["a", "b"])
    assert torch.equal(first.features(batch), out.pooled_NC)
    assert not torch.allclose(out.pooled_NC.norm(dim=-1), torch.ones(len(batch)), atol=1e-2)


@pytest.mark.check("linear-probe", 8)
def test_solving_leaves_the_base_as_it_was(loaded):
    batch = tiny.batch(9)
    batch.target_B = torch.arange(9) % 2
    made = probe.Method(probe.Config(name="linear_probe", c=1.0), loaded, ["a", "b"])
    logs = made.fit(lambda split, views=0: iter([batch]))
    assert pretrained.hash_of(loaded.model.state_dict()) == loaded.weights_hash
    assert made.head.weight.abs().sum() > 0 and set(made.state()) == {"head.weight", "head.bias"} and logs

"""The linear probe solves scikit-learn's problem."""

import pytest
import torch

from finetune.methods import linear_probe as probe

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


def test_a_start_changes_nothing():
    train = problem(60, seed=0)
    cold = probe.solve(train, 4, c=1.0)
    warm = probe.solve(train, 4, c=1.0, start=probe.solve(train, 4, c=0.01))
    torch.testing.assert_close(cold.weight_KD, warm.weight_KD, rtol=0, atol=2e-4)


def test_c_is_the_best_on_validation():
    train, validation = problem(40, seed=0, noise=4.0), problem(80, seed=1, noise=4.0)
    found, exponent, accuracy = probe.search(train, validation, 4, max_iterations=50)
    for other in (-6.0, -2.0, 2.0):
        logits_NK = probe.solve(train, 4, c=10**other, max_iterations=50).logits(validation.features_ND.double())
        assert float((logits_NK.argmax(1) == validation.target_N).double().mean()) <= accuracy
    assert -8 <= exponent <= 8 and found.weight_KD.shape == (4, 10)

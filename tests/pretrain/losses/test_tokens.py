"""Token losses: the formula, its gradient, reductions; everything in float64 against the plain way."""

import math

import pytest
import torch
from torch.nn import functional as F

from pretrain.losses import tokens
from pretrain.losses.tokens import IGNORE, count_B, sample_mean, token_losses, token_sum

B, T, V = 3, 5, 11


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(B, T, V, generator=draw, dtype=torch.float64)
    labels_BT = torch.randint(0, V, (B, T), generator=draw)
    labels_BT[0, 3:] = IGNORE
    labels_BT[2] = IGNORE
    allowed_BTV = torch.rand(B, T, V, generator=draw) < 0.5
    allowed_BTV.scatter_(2, labels_BT.clamp(min=0)[..., None], value=True)
    return logits_BTV, labels_BT, allowed_BTV


def plain(logits_BTV, labels_BT, smoothing, allowed_BTV):
    """The formula word by word, a token at a time."""
    rows = []
    for row in range(B):
        line = []
        for place in range(T):
            y = int(labels_BT[row, place])
            among = range(V) if allowed_BTV is None else allowed_BTV[row, place].nonzero()[:, 0].tolist()
            if y == IGNORE or len(among) == 1:
                line.append(logits_BTV.new_zeros(()))
                continue
            cost = {a: -x for a, x in zip(among, logits_BTV[row, place, list(among)].log_softmax(0))}
            each = smoothing / (len(among) - 1)
            line.append((1 - smoothing - each) * cost[y] + each * sum(cost.values()))
        rows.append(torch.stack(line))
    return torch.stack(rows)


@pytest.mark.parametrize("span", [1, 2 * V, 1 << 19])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("constrained", [False, True])
def test_loss_and_gradient_are_the_formula(case, monkeypatch, span, smoothing, constrained):
    monkeypatch.setitem(tokens.SPAN, "cpu", span)
    logits_BTV, labels_BT, allowed_BTV = case
    among = allowed_BTV if constrained else None
    pull_BT = torch.randn(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = [], []
    for out, function in ((found, lambda z: token_losses(z, labels_BT, smoothing=smoothing, allowed_BTV=among)),
                          (wanted, lambda z: plain(z, labels_BT, smoothing, among))):  # fmt: skip
        leaf = logits_BTV.clone().requires_grad_()
        losses_BT = function(leaf)
        (losses_BT * pull_BT).sum().backward()
        out += [losses_BT.detach(), leaf.grad]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.check("ofa", 6)
def test_smoothing_confidence_and_uniform_logits(case):
    logits_BTV, labels_BT, allowed_BTV = case
    wanted = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(token_losses(logits_BTV, labels_BT), wanted)
    flat_BT = token_losses(torch.zeros_like(logits_BTV), labels_BT, smoothing=0.3, allowed_BTV=allowed_BTV)
    sizes_BT = allowed_BTV.sum(2)
    torch.testing.assert_close(flat_BT[0, :3], sizes_BT[0, :3].double().log())
    whole = token_losses(torch.zeros_like(logits_BTV), labels_BT, smoothing=0.9)
    assert whole[1].tolist() == pytest.approx([math.log(V)] * T)
    grads = []
    for conf in (1.0, 2.0):
        leaf = logits_BTV.clone().requires_grad_()
        loss_B = token_sum(leaf, labels_BT, weight_B=torch.full((B,), conf, dtype=torch.float64), smoothing=0.1)
        loss_B.sum().backward()
        grads.append((loss_B.detach(), leaf.grad))
    torch.testing.assert_close([2 * x for x in grads[0]], list(grads[1]))


@pytest.mark.check("ofa", 5)
def test_the_gradient_of_a_masked_softmax_sums_to_zero_over_its_set(case):
    logits_BTV, labels_BT, allowed_BTV = case
    leaf = logits_BTV.clone().requires_grad_()
    token_losses(leaf, labels_BT, smoothing=0.1, allowed_BTV=allowed_BTV).sum().backward()
    assert leaf.grad[~allowed_BTV].abs().max() == 0
    assert leaf.grad.sum(2).abs().max() < 1e-12  # p sums to one over the set


@pytest.mark.check("vl-t5", 10)
def test_a_sample_mean_is_no_token_mean():
    """Targets of one and of nine tokens: a short answer counts as much as a long one, or a ninth of it."""
    logits_BTV = torch.zeros(2, 9, V)
    logits_BTV[1] = torch.linspace(0, 2, V)
    labels_BT = torch.full((2, 9), 4)
    labels_BT[0, 1:] = IGNORE
    losses_BT = token_losses(logits_BTV, labels_BT)
    one, nine = losses_BT[0, 0], losses_BT[1, 0]
    torch.testing.assert_close(sample_mean(losses_BT, labels_BT).mean(), (one + nine) / 2)
    torch.testing.assert_close(token_sum(logits_BTV, labels_BT).sum() / 10, (one + 9 * nine) / 10)
    assert count_B(labels_BT).tolist() == [1, 9]
    assert abs((one + nine) / 2 - (one + 9 * nine) / 10) > 0.05


def test_a_row_without_labels_costs_nothing_and_has_a_graph():
    logits_BTV = torch.randn(1, 3, V, requires_grad=True)
    labels_BT = torch.full((1, 3), IGNORE)
    loss = sample_mean(token_losses(logits_BTV, labels_BT), labels_BT).sum()
    loss.backward()
    assert loss == 0 and logits_BTV.grad.abs().max() == 0


def test_half_precision_is_summed_in_single():
    logits_BTV = torch.randn(2, 3, V).bfloat16().requires_grad_()
    labels_BT = torch.ones(2, 3, dtype=torch.long)
    losses_BT = token_losses(logits_BTV, labels_BT)
    losses_BT.sum().backward()
    assert losses_BT.dtype == torch.float32 and logits_BTV.grad.dtype == torch.bfloat16
    torch.testing.assert_close(losses_BT, token_losses(logits_BTV.float(), labels_BT))


def test_nothing_as_large_as_the_logits_is_kept():
    logits_BTV = torch.randn(2, 64, 1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_sum(logits_BTV, torch.ones(2, 64, dtype=torch.long)).sum()
    large = [x for x in kept if x.numel() >= logits_BTV.numel()]
    assert {x.untyped_storage().data_ptr() for x in large} == {logits_BTV.untyped_storage().data_ptr()}

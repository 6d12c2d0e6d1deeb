"""Low-rank updates: nothing at first, the formula afterwards, the same when merged, on fused linears too."""

import pytest
import torch
from torch import nn

from finetune.layers.low_rank import LowRank


def drawn(update: LowRank) -> LowRank:
    with torch.no_grad():
        update.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    return update.eval()


def linear(out: int = 6, width: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out)


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.check("lora", 1)
def test_nothing_changes_at_first():
    inner = linear()
    assert torch.equal(LowRank(inner, rank=2, alpha=1.0)(X), inner(X))


@pytest.mark.check("lora", 2)
def test_the_formula():
    inner = linear()
    made = drawn(LowRank(inner, rank=2, alpha=3.0))
    want = inner(X) + 1.5 * X @ made.lora_a[0].T @ made.lora_b[0].T
    torch.testing.assert_close(made(X), want)


@pytest.mark.check("lora", 2)
@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_parts_of_a_fused_linear_are_linears_of_their_own(chosen):
    inner = linear(out=12)
    made = drawn(LowRank(inner, rank=2, alpha=1.0, parts=3, chosen=chosen))
    assert made.lora_a.shape == (len(chosen), 2, 4) and made.lora_b.shape == (len(chosen), 4, 2)
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        alone = nn.Linear(4, 4)
        alone.weight.data, alone.bias.data = inner.weight[rows].detach().clone(), inner.bias[rows].detach().clone()
        if part in chosen:
            g = chosen.index(part)
            alone = LowRank(alone, rank=2, alpha=1.0).eval()
            alone.lora_a.data[0], alone.lora_b.data[0] = made.lora_a[g].data, made.lora_b[g].data
        torch.testing.assert_close(made(X)[..., rows], alone(X))


@pytest.mark.check("lora", 3)
@pytest.mark.parametrize("chosen", [(1,), (0, 1, 2)])
def test_merged_is_the_same_function(chosen):
    made = drawn(LowRank(linear(out=12), rank=2, alpha=1.0, parts=3, chosen=chosen))
    want = made(X).detach()
    merged = made.merged()
    assert type(merged) is nn.Linear and merged is made.inner
    torch.testing.assert_close(merged(X), want)


@pytest.mark.check("lora", 7)
def test_dropout_is_of_the_update_only():
    inner = linear()
    made = drawn(LowRank(inner, rank=2, alpha=1.0, dropout=0.9)).train()
    torch.manual_seed(0)
    assert not torch.equal(made(X), made.eval()(X))
    made.lora_b.data.zero_()
    assert torch.equal(made.train()(X), inner(X))

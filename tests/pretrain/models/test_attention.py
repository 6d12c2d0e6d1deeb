"""Block masks: who sees whom, and that causal attention without a mask is the mask of ones."""

import pytest
import torch

from pretrain.models.attention import Attention, mask_from_blocks


@pytest.mark.parametrize(
    ("blocks", "rows"),
    [
        ([1, 1, 1, 1], ["1000", "1100", "1110", "1111"]),
        ([0, 0, 0, 0], ["1111", "1111", "1111", "1111"]),
        ([0, 0, 1, 1], ["1100", "1100", "1110", "1111"]),
        ([0, 1, 0, 1], ["1000", "1110", "1110", "1111"]),
    ],
)
def test_patterns(blocks: list[int], rows: list[str]) -> None:
    mask_BHTT = mask_from_blocks(torch.tensor([blocks]))
    assert ["".join(str(int(v)) for v in row) for row in mask_BHTT[0, 0]] == rows


def test_padding_is_seen_by_no_other_token() -> None:
    mask = mask_from_blocks(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[True, True, False]]))[0, 0]
    assert mask[:2, 2].sum() == 0
    assert mask[2, 2]


def test_no_mask_means_causal() -> None:
    torch.manual_seed(0)
    attention, x_BTC = Attention(8, 2), torch.randn(2, 5, 8)
    mask = mask_from_blocks(torch.ones(2, 5, dtype=torch.long))
    torch.testing.assert_close(attention(x_BTC), attention(x_BTC, mask))


def test_causal_text_never_sees_what_comes_later() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    x_BTC = torch.randn(1, 5, 8, dtype=torch.double, requires_grad=True)
    attention(x_BTC)[0, 2].sum().backward()
    assert x_BTC.grad is not None
    assert x_BTC.grad[0, 3:].abs().max() == 0
    assert x_BTC.grad[0, :3].abs().min() > 0

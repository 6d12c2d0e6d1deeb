"""Self-critical training: what the rewards of a picture's texts do to their probabilities."""

import pytest
import torch

from pretrain.losses.self_critical import advantages, self_critical
from pretrain.losses.tokens import IGNORE, token_losses


def case(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    logits_RTV = torch.randn(6, 4, 11, generator=draw, dtype=torch.double, requires_grad=True)
    labels_RT = torch.randint(0, 11, (6, 4), generator=draw)
    labels_RT[1, 2:] = IGNORE
    return logits_RTV, labels_RT, torch.rand(2, 3, generator=draw, dtype=torch.double)


@pytest.mark.check("ofa", 8)
def test_rewards_of_a_picture_sum_to_zero_and_equal_texts_teach_nothing():
    logits_RTV, labels_RT, rewards_BK = case()
    torch.testing.assert_close(advantages(rewards_BK).sum(1), torch.zeros(2, dtype=torch.double), rtol=0, atol=1e-12)
    same = rewards_BK[:, :1].expand(2, 3)  # equal texts have equal rewards
    self_critical(token_losses(logits_RTV, labels_RT), same).sum().backward()
    assert logits_RTV.grad.abs().max() < 1e-15


def test_it_is_the_formula_token_by_token():
    logits_RTV, labels_RT, rewards_BK = case(1)
    found = self_critical(token_losses(logits_RTV, labels_RT), rewards_BK)
    log_p = logits_RTV.log_softmax(-1)
    for row in range(6):
        own, others = rewards_BK[row // 3, row % 3], [rewards_BK[row // 3, k] for k in range(3) if k != row % 3]
        better = own - sum(others) / 2
        want = sum(-log_p[row, t, y] * better for t, y in enumerate(labels_RT[row].tolist()) if y != IGNORE)
        torch.testing.assert_close(found[row], want)


def test_the_best_text_becomes_likelier():
    logits_RTV, labels_RT, rewards_BK = case(2)
    self_critical(token_losses(logits_RTV, labels_RT), rewards_BK).sum().backward()
    best, worst = int(rewards_BK[0].argmax()), int(rewards_BK[0].argmin())
    for row, sign in ((best, -1), (worst, 1)):
        label = labels_RT[row, 0]
        assert sign * logits_RTV.grad[row, 0, label] > 0

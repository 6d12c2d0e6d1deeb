"""The objective of instructions: both reductions, mini-batches, ranks, micro-batches; float64, a model of one table."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pretrain import dist
from pretrain.batch import Batch
from pretrain.config import ConfigError
from pretrain.objectives import base, instruction
from tests.pretrain.objectives.table import IGNORE, Table, V, batch
from tests.ranks import POOL


def mixture(**options) -> base.Mixture:
    return base.Mixture(Table(), {"instruction": instruction.Objective(instruction.Config(**options))})


def plain(one: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's cross-entropy times its row's weight [B, U], and what counts, by torch's own."""
    logits_BUV = Table()(one).logits_BUV
    loss_BU = F.cross_entropy(logits_BUV.transpose(1, 2), one.decoder_labels_BU, ignore_index=IGNORE, reduction="none")
    return loss_BU * one.weight_B[:, None], one.decoder_labels_BU != IGNORE


@pytest.mark.check("vl-t5", 10)
def test_reductions_are_the_published_ones():
    one = batch([1, 9, 4])
    loss_BU, counts_BU = plain(one)
    token, _ = mixture()([one])
    sample, _ = mixture(reduction="sample")([one])
    torch.testing.assert_close(token, loss_BU.sum() / 14)
    torch.testing.assert_close(sample, (loss_BU.sum(1) / counts_BU.sum(1)).mean())
    assert abs(token - sample) > 0.01


@pytest.mark.check("ofa", 10)
def test_two_mini_batches_are_two_means():
    first, second = batch([2, 3]), batch([9, 8, 7], seed=1, part=1)
    means = [loss.sum() / counts.sum() for loss, counts in map(plain, (first, second))]
    (losses_a, counts_a), (losses_b, counts_b) = plain(first), plain(second)
    pooled = (losses_a.sum() + losses_b.sum()) / (counts_a.sum() + counts_b.sum())
    found, _ = mixture()([first, second])
    torch.testing.assert_close(found, sum(means))
    assert abs(found - pooled) > 0.1
    whole = replace(first, beside=second)
    torch.testing.assert_close(mixture()(whole.split(None))[0], found)


def gradient(lengths: list[list[int]], mine: list[int], micro: int | None, options: dict) -> tuple[float, torch.Tensor]:
    """Return the loss of a step and its gradient, mean over ranks, which share the rows `mine` of two mini-batches."""
    first, second = (batch(rows, seed=n, part=n) for n, rows in enumerate(lengths))
    share = len(mine) // dist.world()
    rows = mine[dist.rank() * share : (dist.rank() + 1) * share]
    own, beside = (one._rows(min(rows), max(rows) + 1) for one in (first, second))
    made = mixture(**options)
    parts = replace(own, beside=beside).split(micro)
    prepared = made.prepare(parts, 0)
    total = 0.0
    for part, share_of in zip(parts, prepared):
        loss, _ = made([part], prepared=[share_of], pull=({}, []))
        loss.backward()
        total += float(loss.detach())
    found = dist.mean(torch.cat([torch.tensor([total], dtype=torch.float64), made.model.words.grad.flatten()]))
    return float(found[0]), found[1:]


OPTIONS = [{}, {"reduction": "sample"}, {"smoothing": 0.1}, {"rdrop": 1.0, "encouraging": 0.75}]


def gradients(micros: list[int | None]) -> list[list[tuple[float, torch.Tensor]]]:
    """Return `gradient` for all options, for each size of micro-batches."""
    lengths = [[1, 2, 9, 8], [7, 1, 3, 12]]
    return [[gradient(lengths, [0, 1, 2, 3], micro, options) for options in OPTIONS] for micro in micros]


def test_ranks_with_unequal_lengths_are_one_rank_with_all_rows():
    [[wanted, *others]] = POOL.run(1, gradients, [None, 1, 3])
    others += [found for rank in POOL.run(2, gradients, [None, 1]) for found in rank]
    for found in others:
        for (loss, grad), (right, right_grad) in zip(found, wanted):
            assert loss == pytest.approx(right, abs=1e-12)
            torch.testing.assert_close(grad, right_grad, rtol=0, atol=1e-12)


def test_what_is_allowed_is_all_that_is_scored():
    one = batch([2, 2])
    one.allowed_SV = torch.zeros(3, V, dtype=torch.bool)
    one.allowed_SV[0] = True
    one.allowed_BU = torch.tensor([[1, 2], [0, 0]])
    for row, place in ((0, 0), (0, 1)):
        one.allowed_SV[1 + place, [int(one.decoder_labels_BU[row, place]), 5 + place]] = True
    found, _ = mixture()([one])
    logits_BUV = Table()(one).logits_BUV
    among = [logits_BUV[0, place].masked_fill(~one.allowed_SV[1 + place], -torch.inf) for place in range(2)]
    scores = torch.stack([*among, *logits_BUV[1]])
    losses = F.cross_entropy(scores, one.decoder_labels_BU.flatten(), reduction="none")
    torch.testing.assert_close(found, (losses * one.weight_B.repeat_interleave(2)).sum() / 4)


def test_a_table_with_spare_rows_never_writes_them():
    one = batch([1])
    one.allowed_SV = torch.ones(2, V - 3, dtype=torch.bool)
    one.allowed_BU = torch.tensor([[1]])
    sets_BUV = instruction.allowed(torch.zeros(1, 1, V), one)
    assert sets_BUV[0, 0, : V - 3].all() and not sets_BUV[0, 0, V - 3 :].any()
    one.allowed_BU = torch.tensor([[0]])
    assert instruction.allowed(torch.zeros(1, 1, V), one).all(), "a row without candidates may say anything"


def test_the_worst_tokens_are_left_out_after_so_many_steps():
    one = batch([5, 5])
    losses = plain(one)[0].flatten().sort().values
    made = mixture(drop_worst=0.25, drop_worst_after=2)
    for step, kept in ((1, 10), (2, 7)):
        found, _ = made([one], prepared=made.prepare([one], step))
        torch.testing.assert_close(found, losses[:kept].sum() / kept)
    assert made.whole() == ["objectives.instruction"] and mixture().whole() == []
    with pytest.raises((ConfigError, ValueError), match="reduction: token"):
        instruction.Config(drop_worst=0.1, reduction="sample")


class Wavering(Table):
    """Says something else each time, as under dropout."""

    passes = 0

    def forward(self, batch: Batch) -> Table.Encodings:
        self.passes += 1
        found = super().forward(batch)
        found.logits_BUV = found.logits_BUV * (1 + 0.4 * self.passes)
        return found


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_rdrop_is_both_passes_and_what_is_between_them(reduction: str) -> None:
    """Liang et al. 2021, equation 3, divided by the tokens (or samples) of both passes."""
    one, alpha = batch([3, 1, 4]), 0.7
    made = base.Mixture(
        Wavering(), {"instruction": instruction.Objective(instruction.Config(rdrop=alpha, reduction=reduction))}
    )
    found, _ = made([one])
    assert made.model.passes == 2
    logits_BUV, counts_BU = Table()(one).logits_BUV, one.decoder_labels_BU != IGNORE
    total, tokens, samples = 0.0, 0, 0.0
    for row, weight in enumerate(one.weight_B):
        own = 0.0
        for place in counts_BU[row].nonzero()[:, 0].tolist():
            p_V, q_V = ((logits_BUV[row, place] * scale).log_softmax(0) for scale in (1.4, 1.8))
            y = one.decoder_labels_BU[row, place]
            between = (p_V.exp() * (p_V - q_V)).sum() + (q_V.exp() * (q_V - p_V)).sum()
            own = own + weight * (-p_V[y] - q_V[y] + alpha / 2 * between)
        total, tokens = total + own, tokens + int(counts_BU[row].sum())
        samples = samples + own / counts_BU[row].sum()
    torch.testing.assert_close(found, total / (2 * tokens) if reduction == "token" else samples / (2 * len(one)))


def test_rdrop_of_a_model_that_does_not_waver_is_cross_entropy() -> None:
    one = batch([3, 1, 4])
    torch.testing.assert_close(mixture(rdrop=5.0)([one])[0], mixture()([one])[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_encouraging_loss_rewards_what_is_likely(smoothing: float) -> None:
    """The bonus is of the token's own probability, smoothed or not, and weighed as the rest of its loss."""
    one, end = batch([2, 5]), 0.03
    found, _ = mixture(encouraging=end, smoothing=smoothing)([one])
    log_BUV = Table()(one).logits_BUV.log_softmax(-1)
    p_BU = log_BUV.gather(2, one.decoder_labels_BU.clamp(min=0)[..., None])[..., 0].exp()
    line_BU = torch.log(torch.tensor(1 - end)) - (p_BU - end) / (1 - end)
    bonus_BU = torch.where(p_BU <= end, torch.log(1 - p_BU), line_BU) * one.weight_B[:, None]
    rest, _ = mixture(smoothing=smoothing)([one])
    torch.testing.assert_close(found, rest + bonus_BU[one.decoder_labels_BU != IGNORE].sum() / 7)
    assert (p_BU > end).any() and (p_BU <= end).any()
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="encouraging"):
            instruction.Config(encouraging=wrong)


def test_a_step_without_targets_is_zero_with_a_graph():
    one = batch([2, 2])
    one.decoder_labels_BU[:] = IGNORE
    for options in ({}, {"reduction": "sample"}, {"drop_worst": 0.5}, {"rdrop": 1.0}, {"encouraging": 0.75}):
        made = mixture(**options)
        loss, _ = made([one])
        loss.backward()
        assert loss == 0 and made.model.words.grad.abs().max() == 0

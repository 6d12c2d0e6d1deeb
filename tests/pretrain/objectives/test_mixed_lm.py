"""Mixed masks: each end of the mixture is the objective of its name, rows mix exactly, draws know no ranks."""

import math

import pytest
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.losses.targets import next_words
from pretrain.losses.tokens import IGNORE, token_sum
from pretrain.models.candidates import log_likelihood
from pretrain.objectives import base, captioning, masked_lm, mixed_lm, prefix_lm
from tests.pretrain.models import fused

PLUGS = {"mixed_lm": mixed_lm, "masked_lm": masked_lm, "captioning": captioning, "prefix_lm": prefix_lm}


def loss_of(
    name: str, batch, *, step: int = 0, kind: str = "cross", predict: str = "next", **keys
) -> tuple[Tensor, dict]:
    mixture = base.build({name: PLUGS[name].Config(**keys)}, fused.model(kind, predict=predict).eval())
    return mixture([batch], prepared=mixture.prepare([batch], step))


@pytest.mark.check("univl", 10)
@torch.no_grad()
def test_the_ends_of_the_mixture() -> None:
    batch = fused.batch(6, length=12)
    loss, logs = loss_of("mixed_lm", batch, p_causal=0.0)
    assert logs["mixed_lm/lm"] == 0 and loss > 0
    torch.testing.assert_close(loss, loss_of("masked_lm", batch)[0], rtol=1e-12, atol=0)
    loss, logs = loss_of("mixed_lm", batch, p_causal=1.0)
    assert logs["mixed_lm/mlm"] == 0
    torch.testing.assert_close(loss, loss_of("captioning", batch)[0], rtol=1e-12, atol=0)


@torch.no_grad()
def test_each_row_under_both_masks_is_the_sum_of_the_ends() -> None:
    batch = fused.batch(6, length=12)
    loss, logs = loss_of("mixed_lm", batch, mixing="both", mlm=0.5, lm=2.0)
    torch.testing.assert_close(logs["mixed_lm/mlm"], loss_of("masked_lm", batch)[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(logs["mixed_lm/lm"], loss_of("captioning", batch)[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 0.5 * logs["mixed_lm/mlm"] + 2 * logs["mixed_lm/lm"], rtol=1e-12, atol=0)


@pytest.mark.check("univl", 6)
@pytest.mark.parametrize("kind", fused.KINDS)
@pytest.mark.parametrize("recipe", ["shifted", "masked_causal"])
@torch.no_grad()
def test_a_mixed_step_is_its_rows_one_by_one(kind: str, recipe: str) -> None:
    batch = fused.batch(8, length=12)
    objective = mixed_lm.Objective(mixed_lm.Config(recipe=recipe, share=0.4))
    model = fused.model(kind, predict="next" if recipe == "shifted" else "masked").eval()
    mixture = base.Mixture(model, {"mixed_lm": objective})
    loss, _ = mixture([batch])
    sums, counts = torch.zeros(2).double(), torch.zeros(2).double()
    for one in batch.split(1):
        drawn = objective.prepare(one, 0).draws
        states = model(one).fuse(drawn["tokens_RT"], drawn["blocks_RT"], valid_BT=one.valid_BT)
        which = int(drawn["causal_R"])
        sums[which] += token_sum(model.lm_logits(states), drawn["labels_RT"]).sum()
        counts[which] += (drawn["labels_RT"] != IGNORE).sum()
    assert counts.min() > 0
    torch.testing.assert_close(loss, (sums / counts).sum(), rtol=1e-12, atol=0)


@pytest.mark.check("univl", 11)
def test_modes_know_no_ranks_and_come_as_often_as_they_should() -> None:
    objective = mixed_lm.Objective(mixed_lm.Config(p_causal=0.3))
    draw_B = torch.arange(20_000) * 6700417
    whole = objective.causal(draw_B, 0)
    for world in (1, 2, 4):
        parts = [objective.causal(part, 0) for part in draw_B.chunk(world)]
        assert torch.equal(torch.cat(parts), whole)
    assert abs(whole.double().mean() - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 20_000)


@pytest.mark.check("univl", 11)
def test_a_step_of_one_mode_is_a_function_of_seed_and_step() -> None:
    objective = mixed_lm.Objective(mixed_lm.Config(p_causal=0.3, mixing="per_batch"))
    steps = [objective.causal(torch.arange(5), step) for step in range(2000)]
    assert all(one.all() or not one.any() for one in steps)
    share = sum(bool(one[0]) for one in steps) / 2000
    assert abs(share - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 2000)
    other = mixed_lm.Objective(mixed_lm.Config(p_causal=0.3, mixing="per_batch", seed=1))
    assert any(bool(other.causal(torch.arange(5), s)[0]) != bool(steps[s][0]) for s in range(20))
    assert torch.equal(objective.causal(torch.arange(3), 7), steps[7][:3])


def test_a_step_without_words_is_zero_and_has_a_graph() -> None:
    for name, keys in (("mixed_lm", {"p_causal": 1.0}), ("masked_lm", {}), ("captioning", {}), ("prefix_lm", {})):
        batch = fused.batch(3)
        batch.labels_BT = torch.full_like(batch.labels_BT, IGNORE)
        loss, _ = loss_of(name, batch, **keys)
        assert loss == 0
        loss.backward()


@torch.no_grad()
def test_causal_rows_of_the_masked_recipe_learn_to_end() -> None:
    """The end token is hidden in causal rows, or nothing would teach it; never in rows read both ways."""
    batch = fused.batch(40, length=12)
    objective = mixed_lm.Objective(mixed_lm.Config(recipe="masked_causal", share=0.5, mixing="both"))
    objective.attach(fused.model(predict="masked"))
    drawn = objective.prepare(batch, 0).draws
    said = [drawn["labels_RT"][drawn["causal_R"] == causal] for causal in (False, True)]
    assert not (said[0] == fused.END).any() and (said[1] == fused.END).any()
    both, causal = drawn["tokens_RT"][:40], drawn["tokens_RT"][40:]
    words = batch.tokens_BT < fused.START
    assert torch.equal(both[words], causal[words]), "one batch differs in its masks only"


@torch.no_grad()
def test_prefixes() -> None:
    batch = fused.batch(400, length=12, shortest=4)
    objective = prefix_lm.Objective(prefix_lm.Config())
    drawn = objective.prepare(batch, 0).draws
    prefix_B = (drawn["blocks_BT"] == 0).sum(1)
    lengths_B = batch.valid_BT.sum(1)
    assert prefix_B.min() == 1 and (prefix_B < lengths_B).all() and (prefix_B == lengths_B - 1).any()
    for row in range(0, 400, 37):
        prefix, said = int(prefix_B[row]), drawn["labels_BT"][row]
        assert (said[: prefix - 1] == IGNORE).all()
        assert torch.equal(said[prefix - 1 :], next_words(batch.labels_BT)[row, prefix - 1 :])
    batch.labels_BT[:, :3] = IGNORE  # a prompt of two words
    assert ((objective.prepare(batch, 0).draws["blocks_BT"] == 0).sum(1) >= 3).all()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"set model\.fusion\.predict=masked"):
        loss_of("mixed_lm", fused.batch(), recipe="masked_causal")
    with pytest.raises(ConfigError, match=r"set model\.fusion\.predict=next"):
        loss_of("mixed_lm", fused.batch(), predict="masked")
    for name in ("captioning", "prefix_lm"):
        with pytest.raises(ConfigError, match=f"objectives.{name} trains the next word"):
            loss_of(name, fused.batch(), predict="masked")
    provides = type(fused.model("coca")).provides
    with pytest.raises(ConfigError, match=r"masked_lm needs \['cloze'\]"):
        base.refuse_unserved({"masked_lm": masked_lm.Config()}, provides)
    base.refuse_unserved({"captioning": captioning.Config()}, provides)


@pytest.mark.parametrize("kind", ["cross", "joint", "coca"])
@torch.no_grad()
def test_what_follows_a_prompt_is_trained_as_it_is_written(kind: str) -> None:
    """A question is read the same way when its answer is learned and when it is said."""
    batch = fused.batch(3, length=9, shortest=7)
    given_B = torch.tensor([1, 3, 5])
    batch.labels_BT = batch.labels_BT.masked_fill(torch.arange(9) < given_B[:, None], IGNORE)
    model = fused.model(kind).eval()
    ends_B = batch.valid_BT.sum(1) - 1
    texts = [row[given:end].tolist() for row, given, end in zip(batch.tokens_BT, given_B, ends_B)]
    said = -log_likelihood(model, model.remember(batch), texts).sum() / sum(len(text) + 1 for text in texts)
    sections = {"captioning": {}} if kind == "coca" else {"captioning": {}, "mixed_lm": {"p_causal": 1.0}}
    for name, keys in sections.items():
        torch.testing.assert_close(loss_of(name, batch, kind=kind, **keys)[0].float(), said, rtol=1e-5, atol=0)

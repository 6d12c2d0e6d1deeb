"""Hard negatives: never an equal caption, drawn as the softmax has it, within the group; the loss counts pairs."""

import pytest
import torch
from torch.nn import functional as F

from pretrain import registry
from pretrain.config import ConfigError
from pretrain.objectives import base, matching
from tests.pretrain.models import fused


def made(**keys) -> tuple[base.Mixture, matching.Objective]:
    objective = matching.Objective(matching.Config(**keys))
    return base.Mixture(fused.model().eval(), {"matching": objective}), objective


@torch.no_grad()
def test_the_loss_pair_by_pair() -> None:
    mixture, objective = made()
    batch = fused.batch(5)
    batch.caption_B[3] = batch.caption_B[1]
    loss, logs = mixture([batch])
    encodings = mixture.model(batch)
    image_B, text_B = objective.negatives(encodings, objective.prepare(batch, 0).draws["apart_BB"])
    losses, right = [], 0
    for row in range(5):
        for text, picture, label in ((row, row, 1), (row, image_B[row], 0), (text_B[row], row, 0)):
            assert label or batch.caption_B[text] != batch.caption_B[picture]
            one = batch.split(1)[int(text)]
            one.image_NCHW = batch.image_NCHW[int(picture)][None]
            states = mixture.model(one).fuse(one.tokens_BT, torch.zeros_like(one.tokens_BT), valid_BT=one.valid_BT)
            logits = mixture.model.match_logits(states)
            losses.append(F.cross_entropy(logits, torch.tensor([label])))
            right += int(logits.argmax()) == label
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)
    assert logs["matching/accuracy"] == pytest.approx(right / 15)


@torch.no_grad()
def test_rows_among_equal_captions_have_no_mismatch() -> None:
    mixture, objective = made()
    batch = fused.batch(4)
    batch.caption_B[:] = 7
    assert objective.prepare(batch, 0).count == 4
    loss, _ = mixture([batch])
    states = mixture.model(batch).fuse(batch.tokens_BT, torch.zeros_like(batch.tokens_BT), valid_BT=batch.valid_BT)
    own = F.cross_entropy(mixture.model.match_logits(states), torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(loss, own, rtol=1e-12, atol=0)


@torch.no_grad()
def test_negatives_are_drawn_as_the_softmax_has_it() -> None:
    """Over many hashes, against the exact probabilities; and the draw depends on the two samples alone."""
    mixture, objective = made()
    batch = fused.batch(5)
    encodings = mixture.model(batch)
    apart_BB = objective.prepare(batch, 0).draws["apart_BB"]
    logits_BB = (encodings.scale * encodings.text @ encodings.image.T).masked_fill(~apart_BB, -torch.inf)
    wanted_BB = (logits_BB.softmax(1) + matching.FLOOR) * apart_BB
    wanted_BB /= wanted_BB.sum(1, keepdim=True)
    seen_BB, draws = torch.zeros(5, 5).double(), 3000
    for number in range(draws):
        batch.draw_B = (torch.arange(5) + 5 * number) * 7919
        image_B, _ = objective.negatives(encodings, apart_BB)
        seen_BB[torch.arange(5), image_B] += 1 / draws
    assert (seen_BB - wanted_BB).abs().max() < 4 * (0.25 / draws) ** 0.5


@torch.no_grad()
def test_groups_make_micro_batches_of_a_step_alike() -> None:
    mixture, objective = made(among=2)
    batch = fused.batch(8)
    whole, logs = mixture([batch])
    parts, logs_k = mixture(batch.split(4))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(logs_k["matching/accuracy"], logs["matching/accuracy"], rtol=1e-12, atol=0)
    assert not objective.whole and made()[1].whole
    with pytest.raises(ConfigError, match="groups of 2 do not fit into the 3 rows"):
        mixture([fused.batch(3)])


@pytest.mark.parametrize("name", ["matching", "contrastive", "sigmoid", "momentum_contrast"])
def test_texts_without_a_picture_of_their_own_are_refused(name: str) -> None:
    """The third picture would be compared with the third text, whosever it is."""
    batch = fused.batch(4)
    batch.image_NCHW, batch.owner_N = batch.image_NCHW[:3], torch.tensor([0, 2, 3])
    plug = registry.find("pretrain.objectives", name)
    mixture = base.Mixture(fused.model(), {name: plug.Objective(plug.Config())})
    with pytest.raises(ConfigError, match="3 pictures in 4 rows, and an objective compares each text with its picture"):
        mixture([batch], prepared=mixture.prepare([batch], 0))

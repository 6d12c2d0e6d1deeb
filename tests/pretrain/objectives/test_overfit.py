"""Ten samples by heart: the model then writes each caption word by word, and fills in every hidden word."""

import pytest
import torch

from pretrain import dist
from pretrain.losses.tokens import IGNORE
from pretrain.models.base import Writer
from pretrain.models.cache import Cache
from pretrain.objectives import base, captioning, masked_lm, mixed_lm
from tests.pretrain.models import fused

STEPS, RATE = 900, 3e-3
#: each row comes under both masks, so that every step teaches both
SHIFTED = {"mixed_lm": mixed_lm.Config(mixing="both", share=0.3)}
MASKED = {"mixed_lm": mixed_lm.Config(mixing="both", recipe="masked_causal", share=0.4)}


@torch.no_grad()
def greedy(model: Writer, batch, longest: int) -> list[list[int]]:
    """Return what a model writes of each row, the likeliest word at each step."""
    memory, cache = model.remember(batch), Cache()
    tokens_BU = torch.tensor([model.first]).expand(len(batch), -1)
    new_BU = tokens_BU
    for _ in range(longest):
        new_BU = model.write(new_BU, memory, cache)[:, -1:].argmax(-1)
        tokens_BU = torch.cat([tokens_BU, new_BU], 1)
    rows = tokens_BU.tolist()
    return [row[: row.index(model.end) + 1] if model.end in row else row for row in rows]


@pytest.mark.slow
@pytest.mark.check("univl", 13)
@pytest.mark.parametrize(
    ("kind", "predict", "sections"),
    [
        ("cross", "next", SHIFTED),
        ("joint", "next", SHIFTED),
        ("cross", "masked", MASKED),
        ("coca", "next", {"captioning": captioning.Config()}),
    ],
    ids=["cross", "joint", "masked", "coca"],
)
def test_ten_samples_by_heart(kind: str, predict: str, sections: dict) -> None:
    dist.seed_step(0, "overfit")
    section = fused.section(kind, predict=predict)
    section.text.width = 32
    model, batch = type(fused.model(kind)).build(section, fused.WORDS), fused.single(fused.batch(10, length=9))
    mixture, own_B = base.build(sections, model), batch.draw_B
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (STEPS - step) / STEPS)
        batch.draw_B = own_B + 1_000_003 * step  # another epoch, other words
        loss, logs = mixture([batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert greedy(model, batch, 9) == [row[valid].tolist() for row, valid in zip(batch.tokens_BT, batch.valid_BT)]
    if predict == "next":
        assert logs.get("mixed_lm/lm", loss) < 0.1
    if kind != "coca":
        assert_filled_in(model, batch)


@torch.no_grad()
def assert_filled_in(model, batch) -> None:
    """Every word that is hidden is found, over eight draws."""
    objective = base.build({"masked_lm": masked_lm.Config()}, model).objectives["masked_lm"]
    for draw in range(8):
        batch.draw_B = torch.arange(len(batch)) * 31 + 1009 * draw
        cloze = objective.prepare(batch, 0).draws
        states = model(batch).fuse(cloze["tokens_BT"], torch.zeros_like(batch.tokens_BT), valid_BT=batch.valid_BT)
        hidden_BT = cloze["labels_BT"] != IGNORE
        said = model.lm_logits(states).argmax(-1)[hidden_BT]
        assert hidden_BT.any() and torch.equal(said, cloze["labels_BT"][hidden_BT])

"""OFA under DeepSpeed: the same losses at every ZeRO stage, with rows on one rank that the other has none of."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import dist
from pretrain.batch import Batch
from pretrain.engine import deferred, optim, zero
from pretrain.models import ofa
from pretrain.models.cache import Cache
from pretrain.objectives.base import Config, Mixture, Objective, Prepared
from tests.pretrain.models import test_ofa

OPTIM = optim.Config(lr=0.01, weight_decay=0.1, grad_clip=1.0)


class Tokens(Objective):
    """Cross-entropy of every token that the decoder reads next."""

    needs = ("seq2seq",)

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """Return the rows."""
        return Prepared({}, torch.tensor(float(len(batch))))

    def forward(self, encodings: Any, prepared: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over tokens, then rows of all ranks."""
        logits_BUV, tokens_BU = encodings.logits_BUV, encodings.batch.decoder_tokens_BU
        loss_BU = F.cross_entropy(logits_BUV[:, :-1].transpose(1, 2), tokens_BU[:, 1:], reduction="none")
        return loss_BU.mean(1).sum() / prepared.count, {}


def rows(step: int) -> Batch:
    """Return this rank's part of a batch whose first half writes text about pictures, the second codes without them."""
    whole = test_ofa.batch(seed=step)
    whole = replace(whole, image_NCHW=whole.image_NCHW[:2], owner_N=torch.arange(2))
    whole.codes_B = torch.tensor([False, False, True, True])
    return whole.split(4 // dist.world())[dist.rank()] if dist.world() > 1 else whole


def write(model: ofa.OFA, batch: Batch) -> Tensor:
    """Return three written tokens of each row."""
    memory, cache = model.remember(batch), Cache()
    said = [batch.decoder_tokens_BU[:, :1]]
    for _ in range(3):
        said.append(model.write(said[-1], memory, cache)[:, -1:].argmax(-1))
    return torch.cat(said, 1)


def trained(stage: int, *, init: str = "whole", checkpointing: bool = False) -> tuple[list[float], list[list[int]]]:
    """Run on every rank: global losses of four steps, and what is written after them."""
    section = test_ofa.section(dropout=0.0, drop_path=0.0, batch_norm="sync", checkpointing=checkpointing)
    record = None
    dist.seed_step(0, "weights")
    if init == "parts":
        with deferred.recording() as record:
            module = Mixture(ofa.OFA.build(section, test_ofa.WORDS), {"tokens": Tokens(Config())})
    else:
        module = Mixture(ofa.OFA.build(section, test_ofa.WORDS), {"tokens": Tokens(Config())})
    made = zero.Engine(
        module,
        zero.Config(stage=stage, init=init),
        optim_config=OPTIM,
        precision="fp32",
        rows=4 // dist.world(),
        device=torch.device("cpu"),
        record=record,
    )
    try:
        losses = []
        for step in range(4):
            loss, _ = made([rows(step)])
            made.backward(loss)
            made.step(0.01)
            losses.append(dist.mean(loss).item())
        with made.evaluating() as model, torch.no_grad():
            said = model([rows(0)], want=write)
        return losses, said.tolist()
    finally:
        made.close()


def test_the_recipe_builds_it_with_the_symbols_of_its_tokenizer(tmp_path: Any) -> None:
    from pretrain import pretrained, recipe
    from tests import tiny

    folder = tiny.corpus(tmp_path)
    model = recipe.model_section(
        {**test_ofa.section().model_dump(), "tokenizer": str(folder / "tokenizer")}, where="model"
    )
    words = recipe.build_tokenizer(model)
    made = recipe.build_model(model, words)
    assert made.embed_tokens.num_embeddings == words.vocab_size
    assert words.symbol("<code_0>") == words.vocab_size - test_ofa.CODES - test_ofa.BINS
    assert words.symbol("<bin_9>") == words.vocab_size - 1
    found = pretrained.build(model, words, made.state_dict(), source="tests")
    assert isinstance(found.model, ofa.OFA) and found.model.first == (words.start,)


@pytest.mark.slow
def test_losses_and_texts_do_not_depend_on_stage_and_world(ranks) -> None:
    [(reference, said)] = ranks.run(1, trained, 0)
    assert reference[-1] < reference[0]
    for stage in range(4):
        both = ranks.run(2, trained, stage)
        for losses, _ in both:
            assert losses == pytest.approx(reference, rel=1e-5), stage
        assert both[0][1] + both[1][1] == said


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"init": "parts"}, {"checkpointing": True}], ids=["parts", "recomputed"])
def test_stage_3_in_parts_and_recomputed(ranks, keys: dict[str, Any]) -> None:
    [(reference, _)] = ranks.run(1, trained, 0)
    for losses, _ in ranks.run(2, trained, 3, **keys):
        assert losses == pytest.approx(reference, rel=1e-5)

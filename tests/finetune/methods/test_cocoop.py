"""CoCoOp's identities and counts (Zhou et al. 2022): a context that sees the picture."""

import pytest
import torch

from finetune.layers.prompt import Context
from finetune.methods import base, cocoop, coop
from pretrain import pretrained
from pretrain.models import text, vlm
from tests import tiny

NAMES = ["red circle", "blue square", "a very long pink triangle"]


def method(loaded, plug=cocoop, **keys):
    torch.manual_seed(0)
    return plug.Method(plug.Config(name="any", **keys), loaded, NAMES)


def labelled(rows: int = 5):
    batch = tiny.batch(rows)
    batch.target_B = torch.arange(rows) % len(NAMES)
    return batch


@pytest.mark.check("coop", 6)
@torch.no_grad()
def test_a_net_that_gives_nothing_is_coop(loaded):
    mine, theirs = method(loaded), method(loaded, coop, words="a photo of a")
    for p in mine.meta_net[2].parameters():
        p.zero_()
    batch = tiny.batch(4)
    want_NK = theirs.classify(batch, theirs.classes())
    torch.testing.assert_close(mine.classify(batch, None), want_NK, rtol=0, atol=1e-5)
    mine.meta_net[2].bias.normal_()
    assert (mine.classify(batch, None) - want_NK).abs().max() > 1e-3


@pytest.mark.check("coop", 7)
@torch.no_grad()
def test_a_batch_is_its_pictures_one_by_one(loaded):
    made, batch = method(loaded), tiny.batch(5)
    image_NE = loaded.model(batch).image
    one_by_one = torch.cat([made.classify_features(row_NE, None) for row_NE in image_NE.split(1)])
    torch.testing.assert_close(made.classify_features(image_NE, None), one_by_one, rtol=0, atol=1e-5)
    assert not torch.allclose(one_by_one[0], one_by_one[1])


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_change_nothing(folder, chunk):
    found = []
    for size in (None, chunk):
        made = method(pretrained.load(folder), chunk=size)
        loss, _ = base.Finetune(made).train()([labelled()])
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in made.trained().values())])
    assert len(found[0]) == 6 and all(grad.abs().sum() > 0 for grad in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_35360_parameters_for_vit_b16():
    section = vlm.Config(text=text.Config(vocab_size=8))  # the widths of CLIP B/16 are the defaults
    with torch.device("meta"):
        net = cocoop.MetaNet(section.embed_dim, section.text.width)
        context = Context(torch.empty(cocoop.LENGTH, section.text.width), classes=None)
    assert sum(p.numel() for p in net.parameters()) == 33312
    assert sum(p.numel() for module in (net, context) for p in module.parameters()) == 35360


def test_words_and_length(loaded):
    assert method(loaded).context.words.shape == (4, 32)
    assert torch.equal(method(loaded).context.words, loaded.model.text.embed(_ids(loaded, "a photo of a")))
    assert method(loaded, words=None).context.words.shape == (cocoop.LENGTH, 32)
    assert cocoop.Method.epochs(16) == 10


def _ids(loaded, words: str) -> torch.Tensor:
    return torch.tensor(loaded.tokenizer.ids(words))

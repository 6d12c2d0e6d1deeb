"""CoOp's identities and counts (Zhou et al. 2022): what must hold before any training."""

import math

import pytest
import torch
from torch.nn import functional as F

from finetune import delta
from finetune.layers import prompt
from finetune.methods import base, coop
from pretrain import pretrained, recipe
from pretrain.batch import Example
from pretrain.config import ConfigError
from pretrain.engine import optim
from pretrain.models import text, vlm
from tests import tiny

NAMES = ["red circle", "blue square", "a very long pink triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def loaded(folder) -> pretrained.Pretrained:
    return pretrained.load(folder)


def method(loaded, **keys) -> coop.Method:
    torch.manual_seed(0)
    return coop.Method(coop.Config(name="coop", **keys), loaded, NAMES)


def labelled(rows: int = 6):
    batch = tiny.batch(rows)
    batch.target_B = torch.arange(rows) % len(NAMES)
    return batch


def features(loaded, lines: list[str]) -> torch.Tensor:
    rows = [loaded.composer.row(Example(key=line, images=[], suffix=line), []) for line in lines]
    return loaded.model(loaded.composer.collate(rows)).text


@pytest.mark.check("coop", 1)
def test_words_before_training_are_the_zero_shot_template(loaded):
    found_KE = method(loaded, words="a photo of a").classes()
    want_KE = features(loaded, [f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(found_KE, want_KE, rtol=0, atol=1e-6)
    assert (want_KE[0] - want_KE[1]).abs().max() > 1e-3  # else the identity would say nothing


def test_logits_are_scaled_cosines(loaded):
    made = method(loaded, words="a photo of a")
    batch = tiny.batch(4)
    want_NK = loaded.model.scale * loaded.model(batch).image @ made.classes().T
    assert torch.equal(made.classify(batch, made.classes()), want_NK)


@pytest.mark.check("coop", 2)
def test_a_context_of_its_own_for_each_class_starts_as_the_shared_one(loaded):
    one, many = method(loaded, length=4), method(loaded, length=4, per_class=True)
    assert many.context.words.shape == (3, 4, 32)
    assert torch.equal(one.classes(), many.classes())


def test_the_name_is_moved_and_the_end_token_is_not(loaded):
    words = loaded.tokenizer
    prompts = [(words.ids(name), words.ids(".")) for name in NAMES]
    layouts = {p: prompt.layout(words, prompts, 5, p) for p in ("end", "middle", "front")}
    ends = [(tokens_KT == words.end).int().argmax(1).tolist() for tokens_KT, _ in layouts.values()]
    assert ends[0] == ends[1] == ends[2] == [1 + 5 + len(name) + 1 for name, _ in prompts]
    for tokens_KT, place_KT in layouts.values():
        for k, (name, rest) in enumerate(prompts):
            assert [m for m in place_KT[k].tolist() if m >= 0] == list(range(5))  # the context keeps its order
            spoken = tokens_KT[k][place_KT[k] < 0].tolist()
            assert spoken[: len(name) + 3] == [words.start, *name, *rest, words.end]
    first = {p: place_KT[0].tolist() for p, (_, place_KT) in layouts.items()}
    n = len(prompts[0][0])
    assert first["end"][1 : 6 + n] == [0, 1, 2, 3, 4, *[-1] * n]
    assert first["middle"][1 : 6 + n] == [0, 1, *[-1] * n, 2, 3, 4]
    assert first["front"][1 : 6 + n] == [*[-1] * n, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_the_embeddings_follow_the_layout(loaded, position):
    made = method(loaded, length=3, position=position)
    prompts_KTC = made.template(made.context(3))
    assert torch.equal(prompts_KTC[made.template.place_KT < 0], made.template.frozen_KTC[made.template.place_KT < 0])
    for k in range(len(NAMES)):
        assert torch.equal(prompts_KTC[k][made.template.place_KT[k] >= 0], made.context.words)


@pytest.mark.check("coop", 3)
def test_without_context_the_place_of_the_name_says_nothing(loaded):
    words = {"words": None, "length": 0}
    prompts = [prompt.Template(loaded, NAMES, **words, position=p) for p in ("end", "middle", "front")]
    empty_KMC = torch.empty(3, 0, 32)
    first = prompts[0](empty_KMC)
    assert all(torch.equal(other(empty_KMC), first) for other in prompts[1:])
    assert torch.equal(first, loaded.model.text.embed(prompts[0].tokens_KT))


@pytest.mark.check("coop", 5)
def test_the_base_is_untouched_by_ten_steps(loaded):
    module = base.Finetune(method(loaded, length=4)).train()
    sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    for seed in range(10):
        batch = tiny.batch(6, seed=seed)
        batch.target_B = torch.arange(6) % 3
        sgd.zero_grad()
        module([batch])[0].backward()
        sgd.step()
    assert pretrained.hash_of(loaded.model.state_dict()) == loaded.weights_hash


@pytest.mark.check("coop", 8)
@pytest.mark.parametrize("chunk", [1, 2])
def test_classes_in_chunks_are_those_at_once(folder, chunk):
    found = []
    for size in (None, chunk):
        own = pretrained.load(folder)
        made = method(own, length=4, chunk=size)
        loss, _ = base.Finetune(made).train()([labelled()])
        loss.backward()
        found.append((made.classes().detach(), made.context.words.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


@pytest.mark.check("coop", 9)
def test_a_delta_answers_about_other_classes(loaded, tmp_path):
    made = method(loaded, length=4)
    save = {"pretrained": loaded, "method": made.config, "names": NAMES}
    delta.write(tmp_path / delta.FILE, made.state(), **save)
    others = ["green star", "a black and white moon"]
    again = delta.read(tmp_path / delta.FILE, loaded, names=others)
    assert torch.equal(again.context.words, made.context.words) and again.classes().shape == (2, 16)
    own = method(loaded, length=4, per_class=True)
    delta.write(tmp_path / delta.FILE, own.state(), **{**save, "method": own.config})
    with pytest.raises(ConfigError, match="answers about the 3 classes that it was trained on"):
        delta.read(tmp_path / delta.FILE, loaded, names=others)


def test_8192_parameters_for_vit_b16():
    section = vlm.Config(text=text.Config(vocab_size=8))  # CLIP B/16's text width is the default
    module = base.nn.Module()
    module.context = prompt.Context(torch.empty(coop.LENGTH, section.text.width), classes=None)
    assert sum(p.numel() for p in module.parameters()) == 8192
    many = prompt.Context(torch.empty(coop.LENGTH, section.text.width), classes=10)
    assert sum(p.numel() for p in many.parameters()) == 81920


@pytest.mark.check("coop", 4)
def test_only_the_context_has_a_gradient_and_the_scale_is_frozen(loaded):
    module = base.Finetune(method(loaded, length=4))
    batch = tiny.batch(6)
    batch.target_B = torch.arange(6) % 3
    loss, logs = module([batch])
    loss.backward()
    with_grad = {name for name, p in module.named_parameters() if p.grad is not None}
    assert with_grad == {"method.context.words"}
    assert module.method.context.words.grad.abs().sum() > 0
    assert set(logs) == {"accuracy"} and not loaded.model.logit_scale.requires_grad
    want = F.cross_entropy(module([batch], want="logits"), batch.target_B)
    assert torch.equal(loss.detach(), want.detach())


def test_text_is_encoded_once_a_step_and_once_an_evaluation(loaded):
    module, calls = base.Finetune(method(loaded, length=4)), []
    loaded.model.text.register_forward_hook(lambda *_: calls.append(1))
    batch = tiny.batch(2)
    batch.target_B = torch.tensor([0, 1])
    module.train()([batch, batch, batch])
    assert len(calls) == 1
    module.eval()
    with torch.no_grad():
        first = module([batch], want="logits")
        assert torch.equal(first, module([batch], want="logits")) and len(calls) == 2
        module.method.context.words.add_(1.0)
        assert not torch.equal(first, module.eval()([batch], want="logits"))  # the next evaluation has new weights


@pytest.mark.check("coop", 10)
def test_published_learning_rates():
    """The trace that CoOp's users report for 50 epochs (issue 26 of its repository), here with 7 steps an epoch."""
    section = optim.Config(optimizer="sgd", lr=0.002, schedule="epoch_cosine", epoch_steps=7)
    rates = [section.learning_rate(step, 350) for step in range(350)]
    epochs = rates[::7]
    assert rates == [rate for rate in epochs for _ in range(7)]
    assert epochs[:4] == pytest.approx([1e-5, 2e-3, 1.998027e-3, 1.992115e-3], rel=1e-6)
    assert epochs[-1] == pytest.approx(0.001 * (1 + math.cos(math.pi * 48 / 50))) and epochs[-1] > 0


@pytest.mark.parametrize("shots, epochs", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200), (None, 200)])
def test_published_epochs(shots, epochs):
    assert coop.Method.epochs(shots) == epochs


def test_refusals(loaded):
    with pytest.raises(ConfigError, match=r"class 'red circle' needs .* tokens, the text tower takes 40"):
        method(loaded, length=36)
    with pytest.raises(ConfigError, match="has 4 tokens, not 16"):
        method(loaded, words="a photo of a", length=16)
    with pytest.raises(ConfigError, match="the tokenizer joins"):
        coop.Method(coop.Config(name="coop"), loaded, ["red", " "])
    assert recipe.build_model(loaded.config, loaded.tokenizer).provides == ("image", "text")

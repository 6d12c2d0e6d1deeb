"""Every fine-tuning method, found by its file name: it trains what it says, and nothing else moves."""

import math

import pytest
import torch

from finetune import delta
from finetune.methods import base
from pretrain import config, dist, pretrained, registry
from pretrain.config import ConfigError
from pretrain.engine.accumulate import Accumulable
from pretrain.engine.precision import Autocast
from pretrain.engine.run_folder import RunFolder, StaleRunError
from pretrain.models import ofa, text, vlm
from tests import tiny

NAMES = registry.names("finetune.methods")
OPTIONS = {"lora": {"dropout": 0.0}}
CLASSES = ["red circle", "blue square", "green ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.export(tmp_path_factory.mktemp("export"))


def make(name: str, loaded: pretrained.Pretrained) -> base.Method:
    plug = registry.find("finetune.methods", name)
    torch.manual_seed(0)
    method = plug.Method(config.build(plug.Config, {"name": name, **OPTIONS.get(name, {})}), loaded, CLASSES)
    with torch.no_grad():
        method.eval().prepare(lambda split, views=0: iter([labelled()]))
    return method


def labelled(rows: int = 6):
    batch = tiny.batch(rows)
    batch.target_B = torch.arange(rows) % len(CLASSES)
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    plug = registry.find("finetune.methods", name)
    assert plug.__doc__ and "20" in plug.__doc__ and "arXiv" in plug.__doc__, "name the paper and its year"
    assert plug.Method.serves and plug.Method.trains and set(plug.Method.needs) <= {"image", "text", "text_embeds"}


@pytest.mark.parametrize("options", [{"name": name} for name in NAMES] + [{"name": "full", "head": "linear"}])
def test_it_is_built_without_the_other_ranks(options, folder, monkeypatch):
    """It is built on the host, whose tensors a group of GPUs does not exchange."""

    def refuses(*_: object) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "gather_with_grad", refuses)
    plug = registry.find("finetune.methods", options["name"])
    section = config.build(plug.Config, options)
    assert plug.Method(section, pretrained.load(folder), CLASSES).trained()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_only_what_it_trains(name, folder):
    loaded = pretrained.load(folder)
    method = make(name, loaded)
    module = base.Finetune(method).train()
    trained = {f"method.{n}" for n in method.trained()}
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss, logs = module([labelled()])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert loss.isfinite() and all(v.numel() == 1 for v in logs.values())
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= trained
    if not any(n.startswith("method.model.") for n in trained):
        assert not loaded.model.training, "a frozen base stays in eval mode"
        assert pretrained.hash_of(loaded.model.state_dict()) == loaded.weights_hash


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_whole_batch(name, folder):
    found, batch = [], labelled(6)
    for rows in (None, 4, 1):
        loaded = pretrained.load(folder)
        loaded.model.logit_scale.data.fill_(0.5)  # gradients of order one: at CLIP's, float32 differs by 1e-5 already
        module = base.Finetune(make(name, loaded)).train()
        assert isinstance(module, Accumulable) and not module.whole()
        parts = batch.split(rows)
        steps = [module([part], prepared=[n]) for part, n in zip(parts, module.prepare(parts, 0))]
        sum(loss for loss, _ in steps).backward()
        logs = {key: sum(scalars[key] for _, scalars in steps) for key in steps[0][1]}
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        found.append((sum(loss.detach() for loss, _ in steps), logs, grads))
    for loss, logs, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(logs, found[0][1], rtol=1e-6, atol=0)
        assert grads.keys() == found[0][2].keys() and grads
        for key, grad in grads.items():
            torch.testing.assert_close(grad, found[0][2][key], rtol=0, atol=5e-6)  # words of 0.02 have large ones


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_on_a_fresh_base_answers_the_same(name, folder, tmp_path):
    loaded = pretrained.load(folder)
    method = make(name, loaded)
    with torch.no_grad():
        for p in method.trained().values():
            p.add_(0.1 * torch.randn(p.shape))
    path = tmp_path / delta.FILE
    delta.write(path, method.state(), pretrained=loaded, method=method.config, names=CLASSES)
    trained = sum(p.nbytes for p in method.trained().values())
    assert path.stat().st_size < trained + 20_000, "nothing else of the base is in it"
    again = delta.read(path, pretrained.load(folder))
    with torch.no_grad():
        want = base.Finetune(method).eval()([labelled()], want="logits")
        assert torch.equal(base.Finetune(again).eval()([labelled()], want="logits"), want)


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_of_another_base_is_refused(name, folder, tmp_path):
    loaded = pretrained.load(folder)
    method = make(name, loaded)
    path = tmp_path / delta.FILE
    delta.write(path, method.state(), pretrained=loaded, method=method.config, names=CLASSES)
    other = pretrained.load(folder)
    other.weights_hash = "0" * 32
    with pytest.raises(ConfigError, match="give the base that it was trained on"):
        delta.read(path, other)


def test_a_start_that_was_replaced_leaves_the_delta_alone(folder, tmp_path):
    run = RunFolder(tmp_path)
    run.claim()
    RunFolder(tmp_path).claim()
    loaded = pretrained.load(folder)
    method = make("clip_adapter", loaded)
    about = {"pretrained": loaded, "method": method.config, "names": CLASSES}
    with pytest.raises(StaleRunError):
        delta.write(tmp_path / delta.FILE, method.state(), **about, check=run.check_token)
    assert not list(tmp_path.glob("*delta*"))


def test_a_damaged_delta_is_refused(folder, tmp_path):
    (tmp_path / delta.FILE).write_bytes(b"no delta")
    with pytest.raises(ConfigError, match="cannot be read"):
        delta.read(tmp_path / delta.FILE, pretrained.load(folder))


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_of_task_that_it_does_not_serve_is_refused(name):
    serves = registry.find("finetune.methods", name).Method.serves
    with pytest.raises(ConfigError) as error:
        base.refuse_task(name, task="caption", kind="no such kind")
    assert f"{name} serves {serves}, not 'no such kind' (caption)" in str(error.value)


def test_coop_is_refused_on_a_tower_that_takes_no_embeddings():
    section = vlm.Config(text=text.Config(name="hf:folder"))
    with pytest.raises(ConfigError, match=r"coop writes word embeddings .* 'hf:folder' does not take"):
        base.refuse_base("coop", section)
    base.refuse_base("linear_probe", section)


def test_a_base_without_towers_to_compare_is_refused():
    with pytest.raises(
        ConfigError, match=r"coop needs .*, the base is a ofa and provides .*; take a base of two towers"
    ):
        base.refuse_base("coop", ofa.Config(size="tiny"))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_for_towers_and_not_for_logits(name, folder):
    """Cosines times 100 in bf16 have steps of 0.5, and a step of training would see no finer ones."""
    loaded = pretrained.load(folder)
    loaded.model.logit_scale.data.fill_(math.log(100))
    module = Autocast(base.Finetune(make(name, loaded)).eval(), "bf16", device_type="cpu")
    if module.module.method.solved(module.module.method.config) and name != "tip_adapter":
        pytest.skip("never trained, so never in half precision")
    with torch.no_grad():
        logits_NK = module([labelled()], want="logits")
    assert not torch.equal(logits_NK, logits_NK.bfloat16().float())


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_reads_features_answers_from_them_as_from_pictures(name, folder):
    method = make(name, pretrained.load(folder)).eval()
    if method.pictures_by != "features":
        pytest.skip("reads more of the pictures")
    batch = labelled()
    with torch.no_grad():
        classes_KE = method.classes()
        want_NK = method.classify(batch, classes_KE)
        assert torch.equal(method.classify_features(method.model(batch).image, classes_KE), want_NK)
        scaled_NK = method.scale_1 * method.model(batch).image @ torch.eye(16)
        assert torch.equal(scaled_NK, method.model.scale * method.model(batch).image)

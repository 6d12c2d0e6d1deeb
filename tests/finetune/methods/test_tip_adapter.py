"""Tip-Adapter's identities (Zhang et al. 2021): the cache, its votes, its training and the choice of alpha and beta."""

import pytest
import torch
from torch.nn import functional as F

from finetune.methods import base, tip_adapter
from pretrain import pretrained
from tests import tiny
from tests.finetune.methods.test_clip_adapter import NAMES, TEMPLATES, zero_shot


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> pretrained.Pretrained:
    return pretrained.load(tiny.export(tmp_path_factory.mktemp("export")))


def labelled(rows: int = 9, *, seed: int = 0):
    batch = tiny.batch(rows, seed=seed)
    batch.target_B = torch.arange(rows) % len(NAMES)
    return batch


def read(split: str, *, views: int = 0):
    """Hold a batch for training and one for validation; every view is the same."""
    return iter([labelled(seed={"train": 0, "validation": 1}[split])] * max(1, views))


def method(loaded, **keys) -> tip_adapter.Method:
    made = tip_adapter.Method(tip_adapter.Config(name="tip_adapter", templates=TEMPLATES, **keys), loaded, NAMES)
    with torch.no_grad():
        made.prepare(read)
    return made


@pytest.mark.check("clip-adapter", 3)
@torch.no_grad()
def test_a_cache_without_weight_is_zero_shot(loaded):
    made, batch = method(loaded, alpha=0.0), labelled(seed=5)
    cosine_NK = made.classify(batch, made.classes()) / made.scale_1
    torch.testing.assert_close(cosine_NK, zero_shot(loaded, batch), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_published_formula(loaded):
    made, batch = method(loaded, alpha=1.7, beta=2.5), labelled(seed=5)
    image_NE, keys_ME = loaded.model(batch).image, loaded.model(labelled()).image
    affinity_NM = (-2.5 * (1 - image_NE @ keys_ME.T)).exp()
    want_NK = made.scale_1 * zero_shot(loaded, batch) + 1.7 * affinity_NM @ F.one_hot(labelled().target_B).float()
    torch.testing.assert_close(made.classify(batch, made.classes()), want_NK, rtol=0, atol=2e-5)


def drawn_cache(rows: int = 9, width: int = 16) -> tip_adapter.Cache:
    """Return a cache of directions that are well apart."""
    cache = tip_adapter.Cache(width, len(NAMES))
    draw = torch.Generator().manual_seed(0)
    cache.fill(F.normalize(torch.randn(rows, width, generator=draw), dim=-1), torch.arange(rows) % len(NAMES))
    return cache


@pytest.mark.check("clip-adapter", 4)
@torch.no_grad()
def test_a_very_sharp_cache_knows_its_own_pictures():
    cache = drawn_cache()
    votes_NK = cache.votes(cache(cache.keys), 1e4)
    torch.testing.assert_close(votes_NK, F.one_hot(cache.target_M, 3).float(), rtol=0, atol=2.5e-3)


@pytest.mark.check("clip-adapter", 5)
@torch.no_grad()
def test_a_key_gives_itself_one():
    cache = drawn_cache()
    torch.testing.assert_close((-5.5 * (1 - cache(cache.keys).diag())).exp(), torch.ones(9), rtol=0, atol=2e-6)


@pytest.mark.check("clip-adapter", 6)
@torch.no_grad()
def test_keys_that_will_train_start_as_the_cache(loaded):
    plain, trains, batch = method(loaded), method(loaded, train_keys=True), labelled(seed=5)
    assert torch.equal(plain.classify(batch, plain.classes()), trains.classify(batch, trains.classes()))
    assert tip_adapter.Method.solved(plain.config) and not tip_adapter.Method.solved(trains.config)


@pytest.mark.check("clip-adapter", 7)
@torch.no_grad()
def test_the_order_of_the_cache_says_nothing(loaded):
    made, batch = method(loaded), labelled(seed=5)
    before_NK = made.classify(batch, made.classes())
    order_M = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    made.cache.fill(made.cache.keys[order_M].clone(), made.cache.target_M[order_M])
    torch.testing.assert_close(made.classify(batch, made.classes()), before_NK, rtol=0, atol=1e-5)


@pytest.mark.check("clip-adapter", 8)
@torch.no_grad()
def test_every_picture_twice_votes_twice(loaded):
    made, image_NE = method(loaded), loaded.model(labelled(seed=5)).image
    once_NK = made.cache.votes(made.cache(image_NE), 5.5)
    made.cache.fill(made.cache.keys.repeat(2, 1), made.cache.target_M.repeat(2))
    torch.testing.assert_close(made.cache.votes(made.cache(image_NE), 5.5), 2 * once_NK)


@torch.no_grad()
def test_keys_are_means_of_views_before_they_are_normalised(loaded):
    made = tip_adapter.Method(tip_adapter.Config(name="tip_adapter", templates=TEMPLATES, views=2), loaded, NAMES)
    first, second = labelled(seed=0), labelled(seed=1)
    second.keys = first.keys
    made.prepare(lambda split, *, views=0: iter([first, second]))
    raw = [loaded.model.vision(batch.image_NCHW).image_NE for batch in (first, second)]
    want_ME = F.normalize(raw[0] + raw[1], dim=-1)
    torch.testing.assert_close(made.cache.keys, want_ME, rtol=0, atol=1e-6)
    assert made.cache.target_M.tolist() == first.target_B.tolist()


def test_rows_that_only_fill_a_batch_are_not_cached(loaded):
    batch = labelled()
    batch.filler = 2
    made = tip_adapter.Method(tip_adapter.Config(name="tip_adapter", views=0), loaded, NAMES)
    with torch.no_grad():
        made.prepare(lambda split, *, views=0: iter([batch]))
    assert len(made.cache.keys) == len(made.cache.target_M) == 7


@pytest.mark.check("clip-adapter", 10)
def test_only_the_keys_train(loaded):
    module = base.Finetune(method(loaded, train_keys=True)).train()
    module([labelled(seed=5)])[0].backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == {"method.cache.keys"}
    assert set(module.method.state()) == {"cache.keys", "cache.target_M"}


@pytest.mark.check("clip-adapter", 11)
def test_the_grid_gives_its_best_place():
    cache = tip_adapter.Cache(2, 2)
    cache.fill(torch.eye(2), torch.tensor([0, 1]))
    zero_NK = torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # zero-shot says 1 of both
    cosine_NM = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # the cache tells them apart, where it is sharp and heavy
    found_2BA = tip_adapter.judge(cache, zero_NK, cosine_NM, torch.tensor([0, 1]), [0.1, 2.0], [1.0, 20.0])
    assert found_2BA[0].tolist() == [[1.0, 1.0], [1.0, 2.0]]
    for b, beta in enumerate([1.0, 20.0]):
        for a, alpha in enumerate([0.1, 2.0]):
            logits_NK = zero_NK + alpha * cache.votes(cosine_NM, beta)
            want = F.cross_entropy(logits_NK, torch.tensor([0, 1]), reduction="sum")
            assert float(found_2BA[1, b, a]) == pytest.approx(float(want), rel=1e-5)
    assert tip_adapter.best(*found_2BA) == (1, 1)
    hits_BA = torch.tensor([[3.0, 3.0], [3.0, 2.0]])
    assert tip_adapter.best(hits_BA, torch.tensor([[2.0, 1.0], [3.0, 0.1]])) == (0, 1)  # equal hits: the lower loss


@torch.no_grad()
def test_alpha_and_beta_are_chosen_on_validation_and_kept(loaded):
    made = method(loaded, alphas=3, betas=4)
    logs = made.choose(read)
    assert made.config.alpha == logs["alpha"] in tip_adapter.grid(3.0, 3)
    assert made.config.beta == logs["beta"] in tip_adapter.grid(7.0, 4)
    batch = labelled(seed=1)
    right_N = made.classify(batch, made.classes()).argmax(1) == batch.target_B
    assert float(right_N.float().mean()) == pytest.approx(logs["validation_accuracy"])
    fixed = method(loaded, search=False, alpha=0.7)
    assert fixed.choose(read) == {"alpha": 0.7, "beta": 5.5} and tip_adapter.Method.splits(fixed.config) == ("train",)
    assert tip_adapter.Method.splits(made.config) == ("train", "validation")


def test_the_released_grid():
    grid = tip_adapter.grid(7.0, 200)
    assert grid[0] == pytest.approx(0.1) and grid[1] - grid[0] == pytest.approx(6.9 / 200) and grid[-1] < 7


def test_a_table_has_one_view_of_each_picture(loaded):
    batch = labelled()
    batch.image_NE = loaded.model(batch).image.detach()
    batch.image_NCHW = None
    made = tip_adapter.Method(tip_adapter.Config(name="tip_adapter"), loaded, NAMES)
    made.prepare(lambda split, *, views=0: iter([batch]))
    order = sorted(range(len(batch)), key=lambda n: batch.keys[n])
    torch.testing.assert_close(made.cache.keys.detach(), batch.image_NE[order])

"""The zero-shot classifier's identities (Radford et al. 2021, section 3.1.4): templates, norms, shares of the ranks."""

from pathlib import Path

import pytest
import torch

from pretrain import pretrained
from pretrain.batch import Example
from pretrain.evals.base import Features
from pretrain.evals.zero_shot import class_weights
from tests import tiny

NAMES = ["red circle", "blue square", "green ring", "a very long pink triangle", "star"]


def features(loaded: pretrained.Pretrained) -> Features:
    return Features(lambda batch, want: getattr(loaded.model(batch), want), loaded.transform, loaded.composer)


def weights(folder: str, templates: list[str], batch_size: int = 2) -> torch.Tensor:
    """Return class weights [K, E] on this rank."""
    with torch.no_grad():
        return class_weights(features(pretrained.load(folder)), NAMES, templates, batch_size=batch_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.export(tmp_path_factory.mktemp("export")))


@pytest.mark.check("zero-shot", 1)
@torch.no_grad()
def test_one_template_is_the_encoded_sentence(folder):
    loaded = pretrained.load(folder)
    lines = [f"a photo of a {name}." for name in NAMES]
    rows = [loaded.composer.row(Example(key=line, images=[], suffix=line), []) for line in lines]
    want_KE = loaded.model(loaded.composer.collate(rows)).text
    torch.testing.assert_close(weights(folder, ["a photo of a {}."]), want_KE, rtol=0, atol=1e-6)


@pytest.mark.check("zero-shot", 2)
def test_a_template_twice_is_the_template_once(folder):
    once_KE, twice_KE = weights(folder, ["one {}"]), weights(folder, ["one {}", "one {}"])
    torch.testing.assert_close(twice_KE, once_KE, rtol=0, atol=1e-6)
    assert (weights(folder, ["one {}", "a photo of a {}."]) - once_KE).abs().max() > 1e-3


@pytest.mark.check("zero-shot", 3)
def test_weights_are_normalised_means_of_normalised_features(folder):
    parts_KE = [weights(folder, [template]) for template in ("one {}", "a photo of a {}.")]
    both_KE = weights(folder, ["one {}", "a photo of a {}."])
    want_KE = torch.nn.functional.normalize((parts_KE[0] + parts_KE[1]) / 2, dim=-1)
    torch.testing.assert_close(both_KE, want_KE, rtol=0, atol=1e-6)
    torch.testing.assert_close(both_KE.norm(dim=-1), torch.ones(len(NAMES)), rtol=0, atol=1e-6)


@pytest.mark.check("zero-shot", 4)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_encode_shares_of_the_sentences(folder, world, ranks, tmp_path: Path):
    templates = ["one {}", "a photo of a {}."]
    want_KE = weights(folder, templates, batch_size=64)
    for found_KE in ranks.run(world, weights, folder, templates):
        torch.testing.assert_close(found_KE, want_KE, rtol=0, atol=1e-6)

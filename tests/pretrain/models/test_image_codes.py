"""Image tokenizers: codes that come back, equal codes for equal pictures, a middle that knows nothing of its frame."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.data import synthetic
from pretrain.data.decode import decode_image
from pretrain.models import image_codes, patch_kmeans


def pictures(count: int, *, size: int = 32, first: int = 0) -> Tensor:
    """Return coloured shapes in [-1, 1]."""
    found = [decode_image(synthetic.sample(n, size=size, seed=0)["png"]) for n in range(first, first + count)]
    return image_codes.in_unit(torch.stack([torch.tensor(pixels) for pixels in found]).permute(0, 3, 1, 2))


def fitted(kind: str, *, steps: int = 4, **keys: object) -> image_codes.ImageTokenizer:
    """Return a tokenizer of a few codes that has seen some batches."""
    module = image_codes.module_of(kind)
    small = {"patch_kmeans": {"codes": 24}, "vqvae": {"codes": 24, "width": 8, "code_width": 4, "lr": 3e-3}}[kind]
    made = module.Tokenizer(module.Config(**{**small, **keys}))
    made.fit(pictures(12, first=12 * (step % 4)) for step in range(steps))
    return made


@pytest.fixture(scope="module")
def kmeans() -> image_codes.ImageTokenizer:
    return fitted("patch_kmeans")


@pytest.mark.parametrize("kind", image_codes.KINDS)
def test_a_folder_holds_it_and_equal_seeds_fit_equally(kind: str, tmp_path: Path) -> None:
    made, again = fitted(kind), fitted(kind)
    image_codes.save(made, tmp_path / "codes")
    loaded = image_codes.load(tmp_path / "codes")
    seen = pictures(5, first=100)
    codes_NP = made.encode(seen)
    assert codes_NP.shape == (5, 16) and codes_NP.dtype == torch.int64 and 0 <= codes_NP.min() <= codes_NP.max() < 24
    for other in (again, loaded):
        assert torch.equal(other.encode(seen), codes_NP)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in made.state_dict().items())
    assert loaded.kind == kind and loaded.codebook_size == 24 and not loaded.training
    assert not torch.equal(fitted(kind, seed=1).encode(seen), codes_NP)
    assert torch.equal(torch.cat([made.encode(one) for one in seen.split(2)]), codes_NP), "a row's codes are its own"
    assert made.decode(codes_NP).shape == seen.shape


def test_codes_come_back(kmeans: image_codes.ImageTokenizer) -> None:
    codes_NP = kmeans.encode(pictures(8, first=50))
    assert torch.equal(kmeans.encode(kmeans.decode(codes_NP)), codes_NP)
    constant = kmeans.decode(torch.full((1, 9), 5))
    patch = constant[..., :8, :8]
    assert torch.equal(constant, patch.tile(1, 1, 3, 3))
    assert torch.equal(patch.reshape(-1), kmeans.centre_KF[5])


def test_more_codes_and_more_training_show_more(kmeans: image_codes.ImageTokenizer) -> None:
    seen = pictures(8, first=200)

    def error(made: image_codes.ImageTokenizer) -> float:
        with torch.no_grad():
            return (made.decode(made.encode(seen)) - seen).square().mean().item()

    few, many = error(fitted("patch_kmeans", codes=4)), error(fitted("patch_kmeans", codes=128, steps=8))
    assert many < error(kmeans) < few < seen.var().item()
    psnr = 10 * torch.log10(torch.tensor(4 / many))
    assert psnr > 16
    short, long = error(fitted("vqvae", steps=2)), error(fitted("vqvae", steps=80))
    assert long < 0.6 * short


def test_dead_codes_are_put_to_use() -> None:
    made, seen = fitted("vqvae", steps=40, decay=0.9), pictures(12)
    with torch.no_grad():
        made.code_KD[:12], made.count_K[:12], made.sum_KD[:12] = 100.0, 1e-6, 1e-4
        assert made.encode(seen).min() >= 12
        made._follow(made._vectors(made.encoder(seen)), 1)
        assert made.encode(seen).min() < 12 and made.code_KD.abs().max() < 50
    poor = patch_kmeans.Tokenizer(patch_kmeans.Config(codes=24, revive=0.5))
    poor.fit(pictures(12, first=12 * (step % 4)) for step in range(6))
    assert len(torch.cat([poor.encode(pictures(12, first=12 * step)) for step in range(4)]).unique()) >= 16


def test_the_middle_is_encoded_alone(kmeans: image_codes.ImageTokenizer) -> None:
    seen = pictures(3, size=64, first=300)
    inner = kmeans.encode(image_codes.middle(seen))
    assert inner.shape == (3, 16)
    other = seen.clone()
    other[:, :, :16], other[..., 48:] = 0.5, -0.5
    assert torch.equal(kmeans.encode(image_codes.middle(other)), inner)
    other[:, :, 24:32, 24:32] *= -1
    assert not torch.equal(kmeans.encode(image_codes.middle(other)), inner)


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'vqvae'"):
        image_codes.module_of("vqva")
    with pytest.raises(ConfigError, match="no image tokenizer"):
        image_codes.load(tmp_path)
    (tmp_path / image_codes.FILE).write_text('{"kind": "patch_kmeans", "config": {"codes": 8}}')
    with pytest.raises(ConfigError, match="cannot be read"):
        image_codes.load(tmp_path)
    made = patch_kmeans.Tokenizer(patch_kmeans.Config(codes=24))
    with pytest.raises(ConfigError, match="1 differing patches"):
        made.fit([torch.zeros(2, 3, 16, 16)] * 3)

"""Buckets of OFA's relative tables: values of the released code, and the formulas over whole tables."""

import math

import pytest
import torch

from pretrain.models import ofa_positions


def released_token_table(size: int, longest: int) -> torch.Tensor:
    """Return the buckets of all pairs, in the arithmetic of the released code: logarithms in float32."""
    distance = torch.arange(longest)[:, None] - torch.arange(longest)[None, :]
    middle = size // 2
    far = torch.where(distance.abs() < middle, middle - 1, distance.abs())
    spread = torch.ceil(torch.log(far / middle) / math.log((longest - 1) / middle) * (middle - 1)) + middle
    return torch.where(far <= middle, distance, spread.int() * distance.sign()) + size - 1


@pytest.mark.check("ofa", 2)
@pytest.mark.parametrize(("size", "longest"), [(256, 1024), (8, 24), (32, 128)])
def test_token_buckets(size: int, longest: int) -> None:
    table = torch.tensor(ofa_positions.token_table(size, longest))
    place = torch.arange(longest)
    found = table[place[:, None] - place[None, :] + longest - 1]
    assert torch.equal(found, released_token_table(size, longest))
    assert torch.equal(found + found.T, torch.full_like(found, 2 * (size - 1)))
    if size == 256:
        golden = {(0, 0): 255, (0, 1): 254, (1, 0): 256, (0, 127): 128, (0, 128): 127, (0, 129): 126, (0, 1023): 0,
                  (1023, 0): 510}  # fmt: skip
        assert {pair: int(found[pair]) for pair in golden} == golden


@pytest.mark.check("ofa", 2)
def test_image_buckets() -> None:
    every_1K = torch.arange(42 * 42 + 1)[None]
    [found] = ofa_positions.image_buckets(every_1K, every_1K, 42)
    assert found.shape == (1765, 1765)
    assert found.diag()[1:].unique().tolist() == [3444] and found[0, 0] == 6891
    assert found[0, 1:].unique().tolist() == [6889] and found[1:, 0].unique().tolist() == [6890]
    inner = found[1:, 1:]
    assert inner.min() == 0 and inner.max() == 83 * 83 - 1
    assert torch.equal(inner + inner.T, torch.full_like(inner, 2 * 3444))
    assert found[1, 43] == 3444 - 83 and found[43, 1] == 3444 + 83 and found[1, 2] == 3443


def test_a_place_beyond_the_table_counts_as_its_end() -> None:
    table = ofa_positions.Positions(width=4, heads=2, layers=1, longest=6, bucket=4, side=2)
    [[found]] = table.token_buckets(torch.tensor([7]), torch.arange(8)).tolist()
    assert found[0] == found[1] == found[2] == ofa_positions.token_table(4, 6)[-1] == 6 and found[-1] == 3


def test_raster_order() -> None:
    assert ofa_positions.grid_positions(2, 3, 42).tolist() == [1, 2, 3, 43, 44, 45]

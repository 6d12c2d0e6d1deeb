"""The pool of ranks itself: results in order, failures with their traceback, hangs ended."""

import time

import pytest
import torch

from pretrain import dist
from tests.ranks import RankError


def whoami(add: int) -> tuple[int, int, float]:
    return dist.rank(), dist.world(), dist.total(torch.tensor([float(dist.rank() + add)])).item()


def fail_on_one() -> None:
    if dist.rank() == 1:
        raise ValueError("this rank is broken")
    time.sleep(60)


def test_results_come_in_rank_order_from_any_number_of_ranks(ranks):
    assert ranks.run(2, whoami, 10) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert ranks.run(1, whoami, 10) == [(0, 1, 10.0)]


def test_a_failure_is_told_and_the_others_are_not_waited_for(ranks):
    with pytest.raises(RankError) as error:
        ranks.run(2, fail_on_one)
    assert "this rank is broken" in str(error.value)
    assert "rank 0 of 2 hung" in str(error.value) and "fail_on_one" in str(error.value)
    assert ranks.run(2, whoami, 0) == [(0, 2, 1.0), (1, 2, 1.0)]

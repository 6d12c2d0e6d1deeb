"""What the methods' tests share: an untrained export, and the model in it."""

from pathlib import Path

import pytest

from pretrain import pretrained
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def loaded(folder: Path) -> pretrained.Pretrained:
    return pretrained.load(folder)

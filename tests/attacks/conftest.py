"""Models that several files of tests attack."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys.sweeps import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))

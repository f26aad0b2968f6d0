"""One thread (the suite shares few cores, and results then do not depend on how many there are), and no network.

And a directory that all workers of a session share.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)

_SHARED: pytest.StashKey[tempfile.TemporaryDirectory[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist, which deals out the files with the most tests first
    if not hasattr(config, "workerinput"):  # workers inherit it
        config.stash[_SHARED] = folder = tempfile.TemporaryDirectory(prefix="lightning-ssiuu-tests-")
        os.environ["LIGHTNING_SSIUU_TEST_SESSION"] = folder.name


def pytest_unconfigure(config: pytest.Config) -> None:
    if (folder := config.stash.get(_SHARED, None)) is not None:
        folder.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one would keep one worker busy while the others have nothing to do."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])

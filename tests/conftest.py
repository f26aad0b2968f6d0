"""One thread (the suite shares few cores, and results then do not depend on how many there are), and no network."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Under ``-n`` a file keeps its tests together, for what they share; two files share the runs on two processes."""
    shared = item.path.name in ("test_distributed.py", "test_sharded_checkpoint.py")
    item.add_marker(pytest.mark.xdist_group("two_ranks" if shared else item.path.name))

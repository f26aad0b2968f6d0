"""The first examples of a set, in parts."""

from __future__ import annotations

import pytest
import torch

from lightning_ssiuu.evaluation import loaders
from lightning_ssiuu.evaluation.loaders import first_parts
from lightning_ssiuu.utils.errors import UserError

IDS = torch.tensor([[5, 6], [7, 8]])
PART = {"input_ids": IDS, "labels": IDS.where(IDS % 2 == 0, -100), "example_id": torch.arange(2), "options": {}}


def test_as_many_as_asked_for() -> None:
    parts = first_parts([{"forget": PART}] * 3, "forget", 3)
    assert [part["input_ids"].tolist() for part in parts] == [[[5, 6], [7, 8]], [[5, 6]]]
    assert list(parts[0]) == ["input_ids", "labels", "example_id"]
    assert len(first_parts([{"forget": PART}] * 3, "forget", 100)) == 3


def test_ranks_have_equally_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "world_size", lambda: 2)
    monkeypatch.setattr(loaders, "gathered", lambda n: [n, 1])
    short = {name: value[:, :1] if name in ("input_ids", "labels") else value for name, value in PART.items()}
    (part,) = first_parts([{"forget": PART}, {"forget": short}], "forget", 6)  # three of them here
    assert part["input_ids"].tolist() == [[5, 6], [7, 8], [5, 0]]
    assert part["labels"].tolist() == [[-100, 6], [-100, 8], [-100, -100]]
    assert part["example_id"].tolist() == [0, 1, 0]
    monkeypatch.setattr(loaders, "gathered", lambda n: [n, 0])
    with pytest.raises(UserError, match="at least 2, one for each rank"):
        first_parts([{"forget": PART}], "forget", 1)

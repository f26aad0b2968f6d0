"""Sums of gradients by parameter, and which layers are known; the rules are tested in test_single_pass.py."""

from __future__ import annotations

import torch
from torch import nn

from lightning_ssiuu.training.layer_gradients import LAYERS, Sums, rule_of


def test_sums_of_gradients() -> None:
    weight, untouched = nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.zeros(1))
    sums = Sums([weight, untouched], [None, None])
    sums.add_product(weight, torch.ones(3, 1), torch.ones(3, 2))
    sums.add(weight, torch.ones(1, 2))
    total, nothing = sums.tensors
    assert total is not None
    assert total.tolist() == [[4.0, 4.0]]
    assert nothing is None


def test_known_layers() -> None:
    assert rule_of(nn.Linear(1, 1)) is LAYERS[nn.Linear]
    assert rule_of(nn.Bilinear(1, 1, 1)) is None

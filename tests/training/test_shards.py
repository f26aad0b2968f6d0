"""Arithmetic on lists of tensors, where nothing is cut over ranks; what is, is seen in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ssiuu.training import shards


def test_lists_are_gone_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.ones(size) for size in (2, 3, 9)]
    assert [len(block) for block, *_ in shards.blocks(tensors, tensors)] == [3]
    assert list(shards.chunks(tensors, 5)) == [slice(0, 2), slice(2, 3)]
    monkeypatch.setattr(shards, "_CACHED", 4)
    sizes = [[[len(t) for t in column] for column in block] for block in shards.blocks(tensors, tensors)]
    assert sizes == [[[2], [2]], [[3], [3]], [[4], [4]], [[4], [4]], [[1], [1]]]
    for (block,) in shards.blocks(tensors):
        torch._foreach_mul_(block, 2.0)  # views
    assert all((tensor == 2).all() for tensor in tensors)


def test_norms() -> None:
    tensors, parameters = [torch.tensor([3.0]), torch.tensor([4.0]).bfloat16()], [nn.Parameter(torch.zeros(1))] * 2
    assert shards.square(tensors) == 25.0
    assert shards.norm_over_shards(tensors, parameters) == 5.0
    assert shards.over_shards(2.0, shards.shard_device(parameters)) == 2.0


def test_whole_parameters_are_their_own_shards() -> None:
    layer = nn.Linear(1, 1)
    assert list(shards.trained_parameters(layer)) == ["weight", "bias"]
    part = torch.zeros(1)
    assert shards.shard_like(part, layer.bias) is part
    assert torch.equal(shards.cut_like(part, layer.bias), part)
    moved, local = shards.local_state({"bias": part}, {"bias": layer.bias})
    assert moved == {"bias": part}
    assert local == [part]
    (copy,) = shards.snapshot([layer.bias])
    assert torch.equal(copy, layer.bias)
    assert copy.data_ptr() != layer.bias.data_ptr()

"""Parts of an update by hand; over shards they are seen in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ssiuu.training.weight_update import WeightUpdate


def update(before: list[Tensor], after: list[Tensor]) -> tuple[WeightUpdate, list[nn.Parameter]]:
    parameters = [nn.Parameter(value.clone()) for value in after]
    return WeightUpdate(parameters, before, after), parameters


def test_by_hand() -> None:
    before, after = (
        [torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]])],
        [
            torch.tensor([1.5, 2.0]),
            torch.tensor([[1.0], [4.25]]),
        ],
    )
    way, (first, second) = update(before, after)
    way.put(0.5, 0.5)  # of changes 0.5, 0, -2, 0.25 the larger two, halved
    assert first.tolist() == [1.25, 2.0]
    assert second.tolist() == [[2.0], [4.0]]
    way.put(2.0, 0.25)
    assert first.tolist() == [1.0, 2.0]
    assert second.tolist() == [[-1.0], [4.0]]
    way.put(0.0)
    assert [first.tolist(), second.tolist()] == [value.tolist() for value in before]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_share_is_kept(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=generator).to(dtype) for shape in ((50, 7), (33,))]
    after = [value + (torch.randn(value.shape, generator=generator) * 1e-2).to(dtype) for value in before]
    way, parameters = update(before, after)
    changes = torch.cat([(a.double() - b.double()).abs().flatten() for a, b in zip(after, before, strict=True)])
    for keep in (0.001, 0.1, 0.3, 0.77, 1.0):
        way.put(1.0, keep)
        n_kept = max(1, round(keep * len(changes)))
        least = changes.topk(n_kept).values[-1].float() if keep < 1 else 0.0
        for parameter, a, b in zip(parameters, after, before, strict=True):
            kept = (a.double() - b.double()).abs().float() >= least
            assert torch.equal(parameter, torch.where(kept, a, b))  # bit for bit at both ends
    assert int((changes.float() >= way.smallest_kept(0.3)).sum()) >= round(0.3 * len(changes))


def test_equal_changes_are_kept_together() -> None:
    way, (parameter,) = update([torch.zeros(4)], [torch.tensor([1.0, -1.0, 1.0, 0.5])])
    way.put(1.0, 0.25)
    assert parameter.tolist() == [1.0, -1.0, 1.0, 0.0]


def test_an_update_of_nothing() -> None:
    way, (parameter,) = update([torch.ones(3)], [torch.ones(3)])
    way.put(2.0, 0.3)
    assert parameter.tolist() == [1.0, 1.0, 1.0]

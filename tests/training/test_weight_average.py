"""The moving average in closed form; over shards and resumed it is seen in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ssiuu.training.weight_average import WeightAverage


def steps(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator).to(dtype) for _ in range(5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_closed_form(decay: float, dtype: torch.dtype) -> None:
    first, *others = steps(dtype)
    weights = {"w": nn.Parameter(first.clone())}
    average = WeightAverage(decay, weights)
    for value in others:
        with torch.no_grad():
            weights["w"].copy_(value)
        average.update(weights)
    n = len(others)
    expected = decay**n * first.double()
    expected += sum((1 - decay) * decay ** (n - k) * value.double() for k, value in enumerate(others, 1))
    assert average.values["w"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(average.values["w"].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(weights["w"], others[-1])


def test_it_goes_on_from_what_was_saved() -> None:
    first, second, third, *_ = steps(torch.float32)
    whole = WeightAverage(0.5, {"w": nn.Parameter(first)})
    whole.update({"w": nn.Parameter(second)})
    later = WeightAverage(0.5, {"w": nn.Parameter(second)}, {"w": whole.values["w"].clone()})
    for average in (whole, later):
        average.update({"w": nn.Parameter(third)})
    assert torch.equal(whole.values["w"], later.values["w"])

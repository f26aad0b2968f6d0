"""Log space: the regulariser alone, fed with parts of very different probability."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.models import (
    answer_model,
    distance,
    example_log_probability,
    norm,
    part,
)

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.regularizers import AttributionRegularizer

LR = 0.02
WEIGHT = 1e4


def penalties(
    model: AnswerModel, regularizer: AttributionRegularizer, parts: Sequence[Any], own: Sequence[Tensor]
) -> Any:
    """What is added to the gradient ``own`` at each step, weights held."""
    added = []
    for some in parts:
        regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
        for p, g in zip(model.parameters(), own, strict=True):
            p.grad = g.clone().to(p.dtype)
        figures = regularizer.apply(model)
        assert all(math.isfinite(value) for value in figures.values())
        added.append([p.grad - g.to(p.dtype) for p, g in zip(model.parameters(), own, strict=True)])
    return added


def log_space_reference(model: AnswerModel, parts: Sequence[Any]) -> list[tuple[float, list[Tensor]]]:
    """Per step (log factor, penalty / factor / 2λ) in float64, each example's gradient scaled by its own exponent."""
    hf, steps, before = copy.deepcopy(model.hf).double(), [], None
    parameters = list(hf.parameters())
    for some in parts:
        logps, gradients = [], []
        for row in range(len(some["input_ids"])):
            logp, _ = example_log_probability(hf, some, row)
            gradients.append(torch.autograd.grad(logp, parameters))
            logps.append(logp.item())
        m = max(logps)
        g = [sum(math.exp(p - m) * x[i] for p, x in zip(logps, gradients, strict=True)) for i in range(len(parameters))]
        a = [p.detach() * x for p, x in zip(parameters, g, strict=True)]
        if before is not None:
            top = max(m, before[0])
            growth = [
                math.exp(m - top) * now - math.exp(before[0] - top) * then
                for now, then in zip(a, before[1], strict=True)
            ]
            raw = [d * x * (now < 0) for d, x, now in zip(growth, g, a, strict=True)]
            steps.append((m + top, raw))
        before = (m, a)
    return steps


def long_part(answer: int, seed: int) -> dict[str, Tensor]:
    return part([(3, answer), (2, answer - 1)], seed)


@pytest.mark.parametrize("answer", [55, 110])
def test_float32_is_enough_for_answers_of_tiny_probability(answer: int) -> None:
    # exp(−200), and exp(−400) whose square is no float64 either
    model = answer_model(dtype=torch.float32)
    parts = [long_part(answer, n) for n in range(3)]
    logps = model(*[parts[0][k] for k in ("input_ids", "attention_mask", "labels")]).logps
    assert logps.max() < -3 * answer
    own = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in model.parameters()]
    regularizer = AttributionRegularizer(1000.0, "relative")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        added = penalties(model, regularizer, parts, own)
    assert norm(added[0]) == 0
    for got, (_, raw) in zip(added[1:], log_space_reference(model, parts), strict=True):
        assert all(x.isfinite().all() for x in got)
        expected = [x * 1000 * norm(own) / norm(raw) for x in raw]
        assert distance(got, expected) < 2e-3


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
@pytest.mark.parametrize("order", [(1, 60, 1), (60, 1, 60), (1, 20, 100)])
def test_absolute_weight_across_scales(order: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    model = answer_model(dtype=dtype)
    parts = [long_part(max(n, 2), seed) for seed, n in enumerate(order)]
    reference = log_space_reference(model, parts)
    zero = [torch.zeros_like(p) for p in model.parameters()]
    for step, (factor, raw) in enumerate(reference, start=1):
        weight = min(math.exp(-factor), 1e300)  # brings the penalty back to where float32 can hold it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            regularizer = AttributionRegularizer(1.0)
            penalties(model, regularizer, parts[:step], zero)
            regularizer.weight = weight
            added = penalties(model, regularizer, parts[step : step + 1], zero)
        expected = [2 * weight * math.exp(factor) * x for x in raw]
        if norm(expected) > 0:
            assert distance(added[-1], expected) < error
        assert all(x.isfinite().all() for x in added[-1])


def test_micro_batches_of_different_scale_sum_up_in_any_order() -> None:
    model = answer_model()
    one, two = long_part(2, 0), long_part(40, 1)
    results = []
    for order in ((one, two), (two, one)):
        regularizer = AttributionRegularizer(1.0)
        for some in order:
            regularizer.collect(model, model(some["input_ids"], some["attention_mask"], some["labels"]), some)
        regularizer.apply(model)
        results.append([a * math.exp(regularizer._anchor_scale) for a in (regularizer._anchor or {}).values()])
    assert distance(*results) < 1e-13

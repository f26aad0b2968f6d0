"""GRU and task-vector negation, step by step on copies of the weights with plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.adversarial import a_batch, gradient, nll, plus, trained
from toys.models import answer_model, distance, weights

from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.gru import GRU
from lightning_ssiuu.objectives.task_vector import TaskVector

EVERY, BOTH = [0, 1, 2, 3, 4], [0, 1]


def dot(left: list[Tensor], right: list[Tensor]) -> float:
    return sum((a * b).sum().item() for a, b in zip(left, right, strict=True))


# ---- GRU -----------------------------------------------------------------------------------------------------------


def test_the_steps_of_gru() -> None:
    """Three steps; retained is what is forgotten in the first two, so that there is something to leave out."""
    model, lr, smoothing = answer_model(tie_word_embeddings=False), 0.05, 0.6
    batches = [a_batch(seed) for seed in range(3)]
    for one in batches[:2]:
        one["retain"] = {name: value[:2] for name, value in one["forget"].items()}
    module = GRU(smoothing=smoothing, forget_weight=0.7, retain_weight=2.0)
    end, got = trained(module, batches, copy.deepcopy(model), lr)
    at, mean, rectified = weights(model), [torch.zeros_like(w) for w in weights(model)], 0
    for step, one in enumerate(batches):
        g = [-0.7 * x for x in gradient(model, at, nll(one["forget"], EVERY))]
        retain = gradient(model, at, nll(one["retain"], BOTH))
        mean = plus([(1 - smoothing) * m for m in mean], retain, smoothing * 2.0)
        if (along := dot(g, mean)) < 0:
            rectified += 1
            g = plus(g, mean, -along / dot(mean, mean))
            assert abs(dot(g, mean)) < 1e-12
        assert distance(got[step], g) < 1e-10
        at = plus(at, g, -lr)
    assert rectified >= 2
    assert distance(weights(end), at) < 1e-12


def test_a_gradient_that_does_not_conflict_stays_whole() -> None:
    """Forgetting by descent on what is retained: nothing speaks against it."""

    class Learning(GradientDifference):
        def forget_loss(self, batch: Any) -> Tensor:
            return -super().forget_loss(batch)

    model = answer_model(tie_word_embeddings=False)
    one = a_batch(0)
    one["retain"] = one["forget"]
    _, (got,) = trained(GRU(Learning(), smoothing=1.0), [one], copy.deepcopy(model))
    assert distance(got, gradient(model, weights(model), nll(one["forget"], EVERY))) < 1e-12


def test_a_small_step_of_gru_leaves_the_retain_loss() -> None:
    model = answer_model(tie_word_embeddings=False)
    one, start = a_batch(0), weights(model)
    one["retain"] = {name: value[:2] for name, value in one["forget"].items()}
    ascent = gradient(model, start, nll(one["forget"], EVERY))
    keeping = gradient(model, start, nll(one["retain"], BOTH))
    _, (got,) = trained(GRU(smoothing=1.0), [one], copy.deepcopy(model))
    assert dot(ascent, keeping) > 1e-2 * dot(keeping, keeping)
    assert abs(dot(got, keeping)) < 1e-12
    assert dot(got, ascent) < 0  # and still forgets


# ---- task-vector negation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.25, 2.0])
def test_it_is_fine_tuning_mirrored(alpha: float) -> None:
    """SGD on the forget set alone, as anybody would write it, and then ``θ₀ − α (θ_T − θ₀)``."""
    model, lr = answer_model(tie_word_embeddings=False), 0.05
    start = at = weights(model)
    batches = [a_batch(seed) for seed in range(4)]
    for one in batches:
        at = plus(at, gradient(model, at, nll(one["forget"], EVERY)), -lr)
    negated = plus(start, plus(at, start, -1.0), -alpha)
    end, _ = trained(TaskVector(alpha, retain_weight=0.0), batches, copy.deepcopy(model), lr)
    assert distance(weights(end), negated) < 1e-10
    ascent, _ = trained(GradientDifference(forget_weight=alpha, retain_weight=0.0), batches, copy.deepcopy(model), lr)
    assert distance(weights(ascent), negated) > 1e-4


def test_the_retain_gradient_is_taken_at_the_models_own_weights() -> None:
    model, lr = answer_model(tie_word_embeddings=False), 0.1
    batches = [a_batch(0), a_batch(1)]
    start = at = weights(model)
    _, got = trained(TaskVector(0.5, retain_weight=2.0), batches, copy.deepcopy(model), lr)
    for one, found in zip(batches, got, strict=True):
        mirrored = plus(start, plus(start, at, -1.0), 1 / 0.5)
        keeping = gradient(model, at, nll(one["retain"], BOTH))
        update = plus([2.0 * k for k in keeping], gradient(model, mirrored, nll(one["forget"], EVERY)), -0.5)
        assert distance(found, update) < 1e-10
        at = plus(at, update, -lr)

"""Objectives whose forget gradient is taken at other weights: against copies of the weights and plain autograd."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.adversarial import ALL, LENGTHS, a_batch, gradient, length, nll, plus, the_adversarys, trained, value_at
from toys.models import (
    answer_model,
    distance,
    equal,
    part,
    weights,
)

from lightning_ssiuu.objectives.adversarial_unlearning import AdversarialUnlearning
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.mudman import MUDMAN
from lightning_ssiuu.objectives.sam import SAM
from lightning_ssiuu.training.perturbation import displaced, move


@pytest.mark.parametrize("adversary", ["sign", "gradient"])
@pytest.mark.parametrize("floor", [False, True])
def test_the_step_of_adversarial_unlearning(adversary: Any, floor: bool) -> None:
    size = {"sign": 2e-3, "gradient": 0.3}[adversary]
    model = answer_model(tie_word_embeddings=False)
    start, one = weights(model), a_batch(0)
    backbone = GradientDifference(forget_weight=0.7, retain_weight=2.0)
    module = AdversarialUnlearning(backbone, 3, size, None, adversary, adversary_share=0.4)
    learned, rest = the_adversarys(module, one["forget"])
    assert len(learned) == 2
    assert sorted(learned + rest) == [0, 1, 2, 3, 4]

    at = start
    for _ in range(3):
        g = gradient(model, at, nll(one["forget"], learned))
        direction = [x.sign() for x in g] if adversary == "sign" else [x / length(g) for x in g]
        at = plus(at, direction, -size)
    if floor:
        values = {row: 100 * math.exp(-value_at(model, at, nll(one["forget"], [row]))) for row in rest}
        low, middle, high = sorted(values, key=values.__getitem__)
        module.floor = (values[low] + values[middle]) / 2
        rest = [middle, high]
    ascent = gradient(model, at, nll(one["forget"], rest))
    keeping = gradient(model, start, nll(one["retain"], [0, 1]))
    expected = plus([2.0 * k for k in keeping], ascent, -0.7)
    _, (got,) = trained(module, [one], copy.deepcopy(model))
    assert distance(got, expected) < 1e-10
    here = plus([2.0 * k for k in keeping], gradient(model, start, nll(one["forget"], rest)), -0.7)
    assert distance(here, expected) > 1e-4  # the adversary makes a difference


def test_the_step_of_sharpness_aware_minimisation() -> None:
    model, one = answer_model(tie_word_embeddings=False), a_batch(0)
    start = weights(model)
    _, (got,) = trained(SAM(retain_weight=2.0, rho=0.2), [one], copy.deepcopy(model))
    every = [0, 1, 2, 3, 4]
    uphill = [-g for g in gradient(model, start, nll(one["forget"], every))]  # of the forget loss, minus the NLL
    at = plus(start, uphill, 0.2 / length(uphill))
    ascent = gradient(model, at, nll(one["forget"], every))
    keeping = gradient(model, start, nll(one["retain"], [0, 1]))
    assert distance(got, plus([2.0 * k for k in keeping], ascent, -1.0)) < 1e-10
    assert distance(plus([2.0 * k for k in keeping], uphill), got) > 1e-4


def test_the_steps_of_mudman() -> None:
    """Three steps with an adversary that starts anew at the third, by the paper's update rules."""
    model, lr = answer_model(tie_word_embeddings=False), 0.1
    module = MUDMAN(forget_weight=3.0, retain_weight=2.0, fork_every_n_steps=2, adversary_lr=0.5, retain_momentum=0.6)
    batches = [a_batch(seed) for seed in range(3)]
    end, got = trained(module, batches, copy.deepcopy(model), lr)
    at, every = weights(model), [0, 1, 2, 3, 4]
    mean = [torch.zeros_like(w) for w in at]
    for step, one in enumerate(batches):
        if step % 2 == 0:
            adversary = [w.clone() for w in at]
        mean = plus([0.6 * m for m in mean], gradient(model, at, nll(one["retain"], [0, 1])), 0.4 * 2.0)
        learning = gradient(model, adversary, nll(one["forget"], every))
        g = [-x for x in learning]
        masked = [torch.where(x.sign() == m.sign(), x, 0.0) / length(g) for x, m in zip(g, mean, strict=True)]
        assert 0.1 < sum(int((x != 0).sum()) for x in masked) / sum(x.numel() for x in masked) < 0.9
        update = plus(mean, masked, 3.0)
        assert distance(got[step], update) < 1e-9
        at, adversary = plus(at, update, -lr), plus(adversary, learning, -0.5)
    assert distance(weights(end), at) < 1e-12


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        AdversarialUnlearning(steps=0, retain_weight=2.0),
        AdversarialUnlearning(step_size=0.0, retain_weight=2.0),
        SAM(rho=0.0, retain_weight=2.0),
    ],
    ids=["no step", "no size", "no radius"],
)
def test_without_an_adversary_it_is_the_backbone(module: Any) -> None:
    batches = [a_batch(seed) for seed in range(3)]
    expected, _ = trained(GradientDifference(retain_weight=2.0), batches)
    got, _ = trained(module, batches)
    assert distance(weights(got), weights(expected)) < 1e-13


def test_a_single_item_has_no_adversary() -> None:
    batches = [{"forget": part([(3, 2)]), "retain": part([(4, 2)], 1)}]
    expected, _ = trained(GradientDifference(), batches)
    got, _ = trained(AdversarialUnlearning(steps=2, step_size=0.1), batches)
    assert distance(weights(got), weights(expected)) < 1e-13


def test_everything_below_the_floor_leaves_the_retain_loss() -> None:
    batches = [a_batch(0)]
    expected, _ = trained(GradientDifference(forget_weight=0.0), batches)
    got, _ = trained(AdversarialUnlearning(floor=99.0), batches)
    assert distance(weights(got), weights(expected)) < 1e-13


@pytest.mark.parametrize("objective", ALL)
def test_micro_batches_are_averaged(objective: Any) -> None:
    """Adversarial unlearning and SAM: each micro-batch its own displacement; MUDMAN: one adversary, one norm."""
    options: dict[str, Any] = {"retain_weight": 2.0}
    if objective is AdversarialUnlearning:
        options["step_size"] = 1e-2
    pair = [a_batch(0), a_batch(1)]
    _, (together,) = trained(objective(**options), pair, lr=0.0, max_steps=1, accumulate_grad_batches=2)
    if objective is MUDMAN:
        joined = {"forget": part(LENGTHS), "retain": part([(4, 2), (3, 4)])}
        for name in joined:
            width = max(one[name]["input_ids"].shape[1] for one in pair)
            assert all(one[name]["input_ids"].shape[1] == width for one in pair)
            joined[name] = {key: torch.cat([one[name][key] for one in pair]) for key in joined[name]}
        _, (expected,) = trained(objective(**options), [joined], lr=0.0)
    else:
        (_, (first,)), (_, (second,)) = (trained(objective(**options), [one], lr=0.0) for one in pair)
        expected = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert distance(together, expected) < 1e-12


# ---- the weights come back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_restored_to_the_bit(objective: Any, dtype: torch.dtype) -> None:
    model = answer_model(dtype=dtype)
    before = weights(model)
    trained(objective(), [a_batch(0)], model, lr=0.0)
    assert equal(weights(model), before)


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("call", [0, 1])
def test_weights_are_restored_after_an_exception(objective: Any, call: int) -> None:
    class Failing(GradientDifference):
        def forget_loss(self, batch: Any) -> Tensor:
            if (calls := len(seen)) == call:
                raise RuntimeError("failed within the pass")
            seen.append(calls)
            return super().forget_loss(batch)

    seen: list[int] = []
    model = answer_model()
    before = weights(model)
    options = {"step_size": 0.1} if objective is AdversarialUnlearning else {}
    with pytest.raises(RuntimeError, match="failed within"):
        trained(objective(Failing(), **options), [a_batch(0), a_batch(1)], model, lr=0.0)
    assert equal(weights(model), before)


def test_an_exception_inside_a_displacement() -> None:
    layer = nn.Linear(3, 3)
    before = weights(layer)
    with pytest.raises(ValueError, match="inside"), displaced(layer) as parameters:  # noqa: PT012
        move(parameters, [torch.ones_like(p) for p in parameters], 1.0)
        raise ValueError("inside")
    assert equal(weights(layer), before)


def test_mixed_precision_sees_the_moved_weights() -> None:
    """Autocast may keep narrow copies of the weights, which would go on being the old ones."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        values = [layer(torch.ones(1, 1)).item()]
        with displaced(layer) as parameters:
            values.append(layer(torch.ones(1, 1)).item())
            move(parameters, [torch.ones(1, 1)], 1.0)
            values.append(layer(torch.ones(1, 1)).item())
        values.append(layer(torch.ones(1, 1)).item())
    assert values == [1.0, 1.0, 2.0, 1.0]

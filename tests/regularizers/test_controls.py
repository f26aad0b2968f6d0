"""Schedules of a penalty's weight, and the controls, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.models import answer_model, bare_trainer, batch, distance, equal, loader, norm, weights
from toys.regularizers import Split, trained

from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import (
    AttributionRegularizer,
    Combined,
    L2ToStart,
    MatchedUpdateNorm,
    NeuronAttributionRegularizer,
    Regularizer,
)
from lightning_ssiuu.regularizers.penalty import Penalty
from lightning_ssiuu.training.shards import participation
from lightning_ssiuu.utils.errors import UserError


class Fixed(Penalty):
    """A penalty whose gradient is given step by step."""

    def __init__(self, gradients: list[float], log_scale: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gradients, self.log_scale = gradients, log_scale

    def collect(self, model: Any, answers: Any, part: Any) -> None: ...

    def apply(self, model: Any) -> dict[str, float]:
        gradient = torch.tensor([self.gradients[self._n_steps]], dtype=torch.float64)
        figures = self.add(model, list(model.parameters()), [gradient], self.log_scale)
        self._n_steps += 1
        return figures


def added(penalty: Fixed, objective: list[float], start: int = 0) -> list[float]:
    """What is added to a gradient of one number in each step."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    out = []
    for own in objective[start:]:
        model.weight.grad = torch.tensor([own], dtype=torch.float64)
        figures = penalty.apply(model)
        out.append(model.weight.grad.item() - own)
        expected = {"objective_gradient_norm": abs(own), "penalty_gradient_norm": abs(out[-1])}
        if own and (raw := penalty.gradients[penalty._n_steps - 1]):
            expected["log10_penalty_ratio"] = math.log10(abs(raw / own)) + penalty.log_scale / math.log(10)
            expected |= {"objective_participation": 100.0, "penalty_participation": 100.0}
        assert figures == pytest.approx(expected)
    return out


OBJECTIVE, GRADIENTS = [2.0, -4.0, 1.0, 3.0], [0.5, 0.25, -1.0, 0.125]


def test_constant_weight() -> None:
    assert added(Fixed(GRADIENTS, weight=3.0), OBJECTIVE) == pytest.approx([1.5, 0.75, -3.0, 0.375])


def test_constant_relative_weight_hits_the_ratio_in_every_step() -> None:
    got = added(Fixed(GRADIENTS, weight=0.5, weight_mode="relative"), OBJECTIVE)
    assert got == pytest.approx([1.0, 2.0, -0.5, 1.5])


def test_warm_up_is_linear_from_zero() -> None:
    got = added(Fixed(GRADIENTS, weight=3.0, weight_schedule="warmup", schedule_steps=2), OBJECTIVE)
    assert got == pytest.approx([0.0, 0.375, -3.0, 0.375])
    options: Any = {"weight_mode": "relative", "weight_schedule": "warmup", "schedule_steps": 4}
    assert added(Fixed(GRADIENTS, weight=0.5, **options), OBJECTIVE) == pytest.approx([0.0, 0.5, -0.25, 1.125])


@pytest.mark.parametrize("log_scale", [0.0, -900.0])
def test_adaptive_weight_holds_the_ratio_of_moving_averages(log_scale: float) -> None:
    options: Any = {"weight_mode": "relative", "weight_schedule": "adaptive", "schedule_steps": 2}
    got = added(Fixed(GRADIENTS, log_scale, weight=0.5, **options), OBJECTIVE)
    # averages with decay 1/2: objective 2, 3, 2, 2.5; penalty 0.5, 0.375, 0.6875, 0.40625
    lambdas = [0.5 * o / p for o, p in zip([2, 3, 2, 2.5], [0.5, 0.375, 0.6875, 0.40625], strict=True)]
    assert got == pytest.approx([lam * g for lam, g in zip(lambdas, GRADIENTS, strict=True)])


def test_adaptive_weight_passes_over_steps_without_gradients() -> None:
    options: Any = {"weight_mode": "relative", "weight_schedule": "adaptive", "schedule_steps": 2}
    got = added(Fixed([0.0, 0.5, 1.0, 0.25], weight=0.5, **options), [1.0, 2.0, 0.0, 2.0])
    assert got == pytest.approx([0.0, 1.0, 2.0, 0.5 * 2.0 / 0.375 * 0.25])


def test_a_schedule_goes_on_where_it_was() -> None:
    for schedule in ("warmup", "adaptive"):
        options: Any = {"weight": 0.5, "weight_mode": "relative", "weight_schedule": schedule, "schedule_steps": 3}
        whole, first, second = (Fixed(GRADIENTS, **options) for _ in range(3))
        everything = added(whole, OBJECTIVE)
        half = added(first, OBJECTIVE[:2])
        second.load_state(first.state())
        assert half + added(second, OBJECTIVE, 2) == everything


def test_attribution_level_takes_schedules() -> None:
    split = Split()
    regularizer = AttributionRegularizer(0.8, "relative", weight_schedule="warmup", schedule_steps=4)
    log = trained(SSIUU(regularizer=regularizer), answer_model(), [batch(n) for n in range(6)], 6, callbacks=[split])
    ratios = [
        norm([b - a for a, b in zip(own, both, strict=True)]) / norm(own)
        for own, both in zip(split.seen, log, strict=True)
    ]
    assert ratios == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])


@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_participation_counts_the_coordinates_that_carry_a_vector(size: float) -> None:
    vector = torch.zeros(50)
    vector[::10] = size  # 5 of 50 as large, in two tensors
    assert participation([vector[:20], vector[20:]], 5**0.5 * size) == pytest.approx(10.0)
    vector[1:] = 0
    assert participation([vector], size) == pytest.approx(2.0)
    assert participation([torch.zeros(3)], 0.0) == 0.0


# ---- distance to the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_l2_to_start(mode: Any) -> None:
    model, split = answer_model(), Split()
    start = weights(model)
    positions: list[list[Tensor]] = []

    class Positions(L2ToStart):
        def apply(self, model: nn.Module) -> dict[str, float]:
            positions.append(weights(model))
            figures = super().apply(model)
            distance_now = norm([a - b for a, b in zip(positions[-1], start, strict=True)])
            assert figures["distance_to_start"] == pytest.approx(distance_now)
            return figures

    module = GradientDifference(regularizer=Positions(0.7, mode))
    log = trained(module, model, [batch(n) for n in range(3)], 3, callbacks=[split])
    assert equal(split.seen[0], log[0])
    for own, both, here in zip(split.seen[1:], log[1:], positions[1:], strict=True):
        away = [a - b for a, b in zip(here, start, strict=True)]
        factor = 1.4 if mode == "absolute" else 0.7 * norm(own) / norm(away)
        assert distance([b - a for a, b in zip(own, both, strict=True)], [factor * x for x in away]) < 1e-12


def test_l2_to_start_holds_a_copy_of_its_own() -> None:
    model, control = answer_model(), L2ToStart(0.5)
    start = weights(model)
    trained(GradientDifference(regularizer=control), model, [batch(0), batch(1)], 2)
    assert equal(control._start.values(), start)
    assert not equal(weights(model), start)


# ---- length of the update ----------------------------------------------------------------------------------------


def optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def path(regularizer: Regularizer | None, steps: int = 3, **kwargs: Any) -> list[list[Tensor]]:
    """Weights before the first and after each step."""
    model, module = answer_model(), GradientDifference(regularizer=regularizer)
    module.optimizer = optimizer
    module.adopt(model.train(), None)
    seen = [weights(model)]

    class Look(Split):
        def on_before_optimizer_step(self, *_: Any) -> None: ...

        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            seen.append(weights(model))

    bare_trainer(steps, callbacks=[Look()], **kwargs).fit(module, loader([batch(n) for n in range(steps)]))
    return seen


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("length", [1e-3, 0.3, 5.0])
def test_every_step_has_the_given_length_and_the_optimiser_s_direction(length: float, mode: Any) -> None:
    seen, alone = path(MatchedUpdateNorm(length, mode)), path(None, 1)
    for before, after in itertools.pairwise(seen):
        target = length * (norm(before) if mode == "relative" else 1.0)
        assert norm([b - a for a, b in zip(before, after, strict=True)]) == pytest.approx(target, rel=1e-9)
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((seen[0], seen[1]), (alone[0], alone[1]))]
    own, plain = ([x / norm(step) for x in step] for step in steps)
    assert distance(own, plain) < 1e-9


def test_the_figure_is_the_length_without_the_control() -> None:
    alone, control = path(None, 1), MatchedUpdateNorm(1e-3)
    path(control, 1)
    free = norm([b - a for a, b in zip(alone[0], alone[1], strict=True)])
    assert control.apply(answer_model())["update_norm"] == pytest.approx(free, rel=1e-6)


def test_a_step_of_no_length_stays_one() -> None:
    control, layer = MatchedUpdateNorm(1.0), nn.Linear(2, 2)
    before = weights(layer)
    control.apply(layer)
    control.after_step(layer)
    control.after_step(layer)
    assert equal(before, weights(layer))


# ---- several -----------------------------------------------------------------------------------------------------


def everything() -> list[Regularizer]:
    return [
        NeuronAttributionRegularizer(0.3, weight_mode="relative", weight_schedule="adaptive", schedule_steps=2),
        L2ToStart(0.2, "relative", "warmup", 5),
        MatchedUpdateNorm(0.05),
    ]


def test_several_are_one_after_the_other() -> None:
    class Add(Regularizer):
        def __init__(self, number: float) -> None:
            self.number = number

        def collect(self, model: Any, answers: Any, part: Any) -> None: ...

        def apply(self, model: Any) -> dict[str, float]:
            for p in model.parameters():
                p.grad.mul_(2).add_(self.number)
            return {"shared": self.number, f"figure {self.number}": 0.0}

    model = answer_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    figures = Combined([Add(1.0), Add(5.0)]).apply(model)
    assert figures == {"shared": 5.0, "figure 1.0": 0.0, "figure 5.0": 0.0}
    assert all((p.grad == 11).all() for p in model.parameters())
    with pytest.raises(UserError, match=r"regularizer\.regularizers"):
        Combined([])


@pytest.mark.parametrize("one", range(4))
def test_resuming_is_bit_exact(one: int, tmp_path: Any) -> None:
    batches = [batch(n) for n in range(3)]

    def module() -> GradientDifference:
        regularizer = Combined(everything()) if one == 3 else everything()[one]
        module = GradientDifference(regularizer=regularizer)
        module.optimizer = optimizer
        module.adopt(answer_model(dtype=torch.float32).train(), None)
        return module

    whole, first, second = module(), module(), module()
    trainers = [bare_trainer(max_epochs=n) for n in (2, 1, 2)]
    trainers[0].fit(whole, loader(batches))
    trainers[1].fit(first, loader(batches))
    trainers[1].save_checkpoint(tmp_path / "half.ckpt")
    trainers[2].fit(second, loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(weights(whole.model), weights(second.model))
    assert not equal(weights(first.model), weights(second.model))
    assert trainers[0].callback_metrics == trainers[2].callback_metrics


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: L2ToStart(-1.0), "regularizer.weight"),
        (lambda: L2ToStart(weight_mode="both"), "regularizer.weight_mode"),
        (lambda: L2ToStart(1.0, weight_schedule="adaptive"), "regularizer.weight_mode"),
        (lambda: MatchedUpdateNorm(0.0), "regularizer.norm"),
        (lambda: MatchedUpdateNorm(math.nan), "regularizer.norm"),
        (lambda: MatchedUpdateNorm(1.0, "weights"), "regularizer.norm_mode"),
    ],
)
def test_bad_arguments(make: Any, named: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert caught.value.argument == named

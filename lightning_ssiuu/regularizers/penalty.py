"""What penalties have in common: their weight, its schedule, and how their gradient joins the objective's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ssiuu.regularizers.base import Regularizer
from lightning_ssiuu.training.shards import (
    local,
    norm_over_shards,
    over_shards,
    participation,
    shard_device,
    square,
)
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice, check_number

WeightMode = Literal["absolute", "relative"]
WeightSchedule = Literal["constant", "warmup", "adaptive"]


class Penalty(Regularizer):
    """A regulariser that adds a penalty's gradient to the objective's.

    Args:
        weight: λ ≥ 0. With 0 nothing is computed and training is the backbone's, bit for bit.
        weight_mode: ``"absolute"`` multiplies the penalty's gradient by λ. ``"relative"`` makes its norm ``weight``
            times the norm of the objective's gradient.
        weight_schedule: ``"constant"``; ``"warmup"`` multiplies ``weight`` by min(1, n / ``schedule_steps``) at the
            n-th optimiser step (counted from 0); ``"adaptive"``, with ``weight_mode: relative`` alone, holds the ratio
            between exponential moving averages of the two norms (decay 1 − 1/``schedule_steps``) and not in every step,
            so that a step in which the penalty is large gives it more weight than one in which it is small.
        schedule_steps: Optimiser steps, ≥ 1.
    """

    state_attributes: ClassVar[tuple[str, ...]] = ("_n_steps", "_averages")

    def __init__(
        self,
        weight: float = 1e-3,
        weight_mode: WeightMode = "absolute",
        weight_schedule: WeightSchedule = "constant",
        schedule_steps: int = 10,
    ) -> None:
        check_number("regularizer.weight", weight)
        check_choice("regularizer.weight_mode", weight_mode, WeightMode)
        check_choice("regularizer.weight_schedule", weight_schedule, WeightSchedule)
        if weight_schedule == "adaptive" and weight_mode != "relative":
            allowed = "relative with weight_schedule adaptive, where weight is a ratio of norms"
            raise UserError("regularizer.weight_mode", weight_mode, allowed)
        check_at_least("regularizer.schedule_steps", schedule_steps, 1)
        self.weight, self.weight_mode = weight, weight_mode
        self.weight_schedule, self.schedule_steps = weight_schedule, schedule_steps
        self._n_steps = 0
        # Logarithms of the moving averages: an attribution penalty's gradient may be of size e^−400.
        self._averages = {"objective": -math.inf, "penalty": -math.inf}

    @torch.no_grad()
    def add(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        log_scale: float = 0.0,
        squares: float | None = None,
    ) -> dict[str, float]:
        """Add ``λ e^log_scale · gradients`` to ``.grad``, once per optimiser step.

        Returns the two norms as added, the logarithm of their ratio for λ = 1, and both gradients' participation ratio.
        The gradients are this rank's shards where ``parameters`` are, ``squares`` their
        :func:`~lightning_ssiuu.training.shards.square` if known; e^log_scale may be far outside what a float holds.
        """
        mine = [local(p.grad) for p in model.parameters() if p.grad is not None]
        objective, shards = norm_over_shards(mine, parameters), shard_device(parameters)
        raw = math.sqrt(over_shards(square(gradients) if squares is None else squares, shards))
        coefficient = self._coefficient(objective, raw, log_scale)
        figures = {"objective_gradient_norm": objective, "penalty_gradient_norm": coefficient * raw}
        if raw > 0 and objective > 0:
            figures["log10_penalty_ratio"] = (math.log(raw) + log_scale - math.log(objective)) / math.log(10)
            figures["objective_participation"] = participation(mine, objective, shards)
            figures["penalty_participation"] = participation(gradients, raw, shards)
        for parameter, penalty in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = local(parameter.grad)
            own.add_(penalty.to(own.dtype), alpha=coefficient)
        return figures

    def _coefficient(self, objective: float, raw: float, log_scale: float) -> float:
        weight = self.weight
        if self.weight_schedule == "warmup":
            weight *= min(1.0, self._n_steps / self.schedule_steps)
        if self.weight_schedule == "adaptive" and raw > 0 and objective > 0:
            sizes = {"objective": math.log(objective), "penalty": math.log(raw) + log_scale}
            steps = self.schedule_steps
            self._averages = {name: _moved(self._averages[name], size, steps) for name, size in sizes.items()}
        if weight == 0 or raw == 0:
            return 0.0
        if self.weight_mode == "absolute":
            return math.exp(math.log(weight) + log_scale)
        if self.weight_schedule == "adaptive":
            # Where the objective's gradient is zero, λ is what it was.
            behind = self._averages["objective"] - self._averages["penalty"]
            return weight * math.exp(behind + log_scale) if math.isfinite(behind) else 0.0
        return weight * objective / raw


def _moved(average: float, value: float, steps: int) -> float:
    if average == -math.inf:
        return value
    top, kept = max(average, value), 1 - 1 / steps
    return top + math.log(kept * math.exp(average - top) + (1 - kept) * math.exp(value - top))

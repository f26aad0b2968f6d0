"""Controls: what plainer ways to hold the weights back achieve, with the attribution regularisers' interface."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers
from lightning_ssiuu.regularizers.base import Regularizer
from lightning_ssiuu.regularizers.penalty import Penalty, WeightMode, WeightSchedule
from lightning_ssiuu.training.shards import (
    chunks,
    local,
    local_state,
    over_shards,
    shard_device,
    shard_like,
    snapshot,
    square,
    trained_parameters,
)
from lightning_ssiuu.utils.errors import UserError, check_choice, check_number


class L2ToStart(Penalty):
    """The penalty ``λ ‖θ − θ₀‖²`` over the trained weights, θ₀ their values when training starts.

    Adds ``2λ (θ − θ₀)`` to the gradient: unlike AdamW's decoupled weight decay it pulls to where training began, not to
    zero, and passes through the optimiser. Holds a copy of the trained weights (with adapters: of the adapters).

    Args:
        weight: λ ≥ 0; with 0 nothing is computed.
        weight_mode: ``"absolute"`` takes λ, ``"relative"`` scales the penalty's gradient to ``weight`` times the norm
            of the objective's; see :class:`~lightning_ssiuu.regularizers.penalty.Penalty`.
        weight_schedule: ``"constant"``, ``"warmup"`` or ``"adaptive"``; see there.
        schedule_steps: Optimiser steps of the schedule, ≥ 1.

    Raises:
        UserError: If an argument is outside its range.

    Example:
        >>> layer, control = nn.Linear(1, 1, bias=False), L2ToStart(weight=0.5)
        >>> _ = control.apply(layer)
        >>> _ = layer.weight.data.add_(3.0)
        >>> _ = control.apply(layer)
        >>> layer.weight.grad
        tensor([[3.]])
    """

    def __init__(
        self,
        weight: float = 1e-3,
        weight_mode: WeightMode = "absolute",
        weight_schedule: WeightSchedule = "constant",
        schedule_steps: int = 10,
    ) -> None:
        super().__init__(weight, weight_mode, weight_schedule, schedule_steps)
        self._start: dict[str, Tensor] | None = None

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """Nothing: the penalty knows no data."""

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, float]:
        """Add the penalty's gradient to ``.grad``; in the first step, remember the weights.

        Returns:
            ``objective_gradient_norm``, ``penalty_gradient_norm`` (as added), ``distance_to_start`` (‖θ − θ₀‖).
        """
        if self.weight == 0:
            return {}
        named = trained_parameters(model)
        parameters = list(named.values())
        if self._start is None:  # before the first step of the optimiser these still are the original weights
            copies = snapshot(parameters)
            self._start = {n: shard_like(copy, p) for (n, p), copy in zip(named.items(), copies, strict=True)}
        if self._start.keys() != named.keys():
            raise UserError(
                "regularizer", type(self).__name__, "the same trained weights as in the run that is resumed"
            )
        self._start, start = local_state(self._start, named)
        away = [local(p.detach()) - s for p, s in zip(parameters, start, strict=True)]
        squares = square(away)
        figures = self.add(model, parameters, away, math.log(2), squares)
        self._n_steps += 1
        return figures | {"distance_to_start": math.sqrt(over_shards(squares, shard_device(parameters)))}

    def state_dict(self) -> dict[str, Any]:
        """The weights at the start by parameter name, and the schedule."""
        return super().state_dict() | {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the start of an interrupted run."""
        super().load_state_dict(state)
        self._start = state["start"]


class MatchedUpdateNorm(Regularizer):
    """Scales every optimiser step to the same length, so that objectives are compared at equal distance travelled.

    ``θ ← θ_old + ν (θ_new − θ_old) / ‖θ_new − θ_old‖`` over all trained weights together, whatever the optimiser made
    of learning rate, clipping and weight decay; a step of length 0 stays 0. Weights in bfloat16 reach ν but for their
    rounding. Holds a copy of the trained weights during the step. DeepSpeed's ZeRO is refused.

    Args:
        norm: Euclidean length of every step, > 0: ν itself or a fraction of ‖θ_old‖.
        norm_mode: ``"absolute"`` or ``"relative"`` to the norm of the trained weights.

    Raises:
        UserError: If an argument is outside its range.

    Example:
        >>> layer, control = nn.Linear(1, 1, bias=False), MatchedUpdateNorm(norm=0.5)
        >>> before, _ = layer.weight.item(), control.apply(layer)
        >>> _ = layer.weight.data.add_(3.0)
        >>> control.after_step(layer)
        >>> round(layer.weight.item() - before, 4)
        0.5
    """

    under_zero = False

    def __init__(self, norm: float, norm_mode: WeightMode = "absolute") -> None:
        check_number("regularizer.norm", norm, positive=True)
        check_choice("regularizer.norm_mode", norm_mode, WeightMode)
        self.norm, self.norm_mode = norm, norm_mode
        self._before: list[Tensor] | None = None
        self._length: float | None = None

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def apply(self, model: nn.Module) -> dict[str, float]:
        """Remember the weights.

        Returns:
            ``update_norm``: what the step before this one would have been.
        """
        self._before = snapshot(trained_parameters(model).values())
        return {} if self._length is None else {"update_norm": self._length}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Scale the step that was just taken."""
        if self._before is None:
            return
        before, self._before = self._before, None
        parameters = list(trained_parameters(model).values())
        shards, now = shard_device(parameters), [local(p) for p in parameters]
        squares = math.fsum(square(torch._foreach_sub(now[c], before[c])) for c in chunks(before))
        self._length = math.sqrt(over_shards(squares, shards))
        if self._length == 0:
            return
        target = self.norm
        if self.norm_mode == "relative":
            target *= math.sqrt(over_shards(square(before), shards))
        for c in chunks(before):
            torch._foreach_lerp_(before[c], now[c], target / self._length)
            torch._foreach_copy_(now[c], before[c])

    def state_dict(self) -> dict[str, Any]:
        """The figure that is logged next; nothing else outlives a step."""
        return {"length": self._length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the figure."""
        self._length = state["length"]


class Combined(Regularizer):
    """Several regularisers, one after the other, as if they were one.

    Each sees the gradients and weights as those before it have left them: put :class:`MatchedUpdateNorm` last. A figure
    that two of them give is the later one's.

    Args:
        regularizers: At least one.

    Raises:
        UserError: If there is none.

    Example:
        >>> Combined([L2ToStart(0.1), MatchedUpdateNorm(0.5)]).under_zero
        False
    """

    def __init__(self, regularizers: list[Regularizer]) -> None:
        if not regularizers:
            raise UserError("regularizer.regularizers", regularizers, "at least one regulariser")
        self.regularizers = regularizers
        self.under_zero = all(one.under_zero for one in regularizers)

    def prepare(self, module: Any) -> None:
        """Each one's."""
        for one in self.regularizers:
            one.prepare(module)

    def before_forward(self, model: nn.Module, part: Mapping[str, Tensor]) -> None:
        """Each one's."""
        for one in self.regularizers:
            one.before_forward(model, part)

    def before_backward(self, model: nn.Module, loss: Tensor) -> None:
        """Each one's."""
        for one in self.regularizers:
            one.before_backward(model, loss)

    def collect(self, model: nn.Module, answers: Answers, part: Mapping[str, Tensor]) -> None:
        """Each one's."""
        for one in self.regularizers:
            one.collect(model, answers, part)

    def apply(self, model: nn.Module) -> dict[str, float]:
        """Each one's; all figures."""
        figures: dict[str, float] = {}
        for one in self.regularizers:
            figures |= one.apply(model)
        return figures

    def after_step(self, model: nn.Module) -> None:
        """Each one's."""
        for one in self.regularizers:
            one.after_step(model)

    def state_dict(self) -> dict[str, Any]:
        """Each one's, by its number."""
        return {str(number): one.state_dict() for number, one in enumerate(self.regularizers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each one's."""
        for number, one in enumerate(self.regularizers):
            one.load_state_dict(state[str(number)])

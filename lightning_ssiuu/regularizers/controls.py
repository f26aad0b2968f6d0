"""Controls: what plainer ways to hold the weights back achieve, with the attribution regularisers' interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.regularizers.base import Regularizer
from lightning_ssiuu.regularizers.penalty import Penalty, WeightMode
from lightning_ssiuu.training.shards import (
    chunks,
    local,
    local_state,
    norm_over_shards,
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
    zero, and passes through the optimiser. Holds a copy of the trained weights (with adapters: of the adapters). The
    options are :class:`~lightning_ssiuu.regularizers.penalty.Penalty`'s.

    Example:
        >>> L2ToStart(weight=0.5, weight_schedule="warmup").schedule_steps
        10
    """

    state_attributes = (*Penalty.state_attributes, "_start")
    _start: dict[str, Tensor] | None = None

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, float]:
        if self.weight == 0:
            return {}
        named = trained_parameters(model)
        parameters = list(named.values())
        if self._start is None:  # before the first step of the optimiser these still are the original weights
            self._start = {n: shard_like(w, p) for (n, p), w in zip(named.items(), snapshot(parameters), strict=True)}
        if self._start.keys() != named.keys():
            allowed = "the same trained weights as in the run that is resumed"
            raise UserError("regularizer", type(self).__name__, allowed)
        self._start, start = local_state(self._start, named)
        away = [local(p.detach()) - s for p, s in zip(parameters, start, strict=True)]
        squares = square(away)
        figures = self.add(model, parameters, away, math.log(2), squares)
        self._n_steps += 1
        return figures | {"distance_to_start": math.sqrt(over_shards(squares, shard_device(parameters)))}


class MatchedUpdateNorm(Regularizer):
    """Scales every optimiser step to the same length, so that objectives are compared at equal distance travelled.

    ``θ ← θ_old + ν (θ_new − θ_old) / ‖θ_new − θ_old‖`` over all trained weights together, whatever the optimiser made
    of learning rate, clipping and weight decay; a step of length 0 stays 0. Weights in bfloat16 reach ν but for their
    rounding. Holds a copy of the trained weights during the step.

    Args:
        norm: Euclidean length of every step, > 0: ν itself or a fraction of ‖θ_old‖.
        norm_mode: ``"absolute"`` or ``"relative"`` to the norm of the trained weights.

    Example:
        >>> MatchedUpdateNorm(norm=0.01, norm_mode="relative").norm
        0.01
    """

    state_attributes = ("_length",)  # the figure that is logged next; nothing else outlives a step

    def __init__(self, norm: float, norm_mode: WeightMode = "absolute") -> None:
        check_number("regularizer.norm", norm, positive=True)
        check_choice("regularizer.norm_mode", norm_mode, WeightMode)
        self.norm, self.norm_mode = norm, norm_mode
        self._before: list[Tensor] | None = None
        self._length: float | None = None

    def apply(self, model: nn.Module) -> dict[str, float]:
        """Remember the weights; returns ``update_norm``, what the step before this one would have been."""
        self._before = snapshot(trained_parameters(model).values())
        return {} if self._length is None else {"update_norm": self._length}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if self._before is None:
            return
        before, self._before = self._before, None
        parameters = list(trained_parameters(model).values())
        now = [local(p) for p in parameters]
        squares = math.fsum(square(torch._foreach_sub(now[c], before[c])) for c in chunks(before))
        self._length = math.sqrt(over_shards(squares, shard_device(parameters)))
        if self._length == 0:
            return
        target = self.norm * (norm_over_shards(before, parameters) if self.norm_mode == "relative" else 1)
        for c in chunks(before):
            torch._foreach_lerp_(before[c], now[c], target / self._length)
            torch._foreach_copy_(now[c], before[c])


def _each(hook: str) -> Callable[..., None]:
    @wraps(getattr(Regularizer, hook))
    def call(self: Combined, *args: Any) -> None:
        for regularizer in self.regularizers:
            getattr(regularizer, hook)(*args)

    return call


class Combined(Regularizer):
    """Several regularisers, one after the other, as if they were one.

    Each sees the gradients and weights as those before it have left them: put :class:`MatchedUpdateNorm` last. A figure
    that two of them give is the later one's.

    Args:
        regularizers: At least one.

    Example:
        >>> list(Combined([L2ToStart(0.1), MatchedUpdateNorm(0.5)]).state())
        ['0', '1']
    """

    def __init__(self, regularizers: list[Regularizer]) -> None:
        if not regularizers:
            raise UserError("regularizer.regularizers", regularizers, "at least one regulariser")
        self.regularizers = regularizers

    @property
    def differentiates(self) -> bool:
        return any(regularizer.differentiates for regularizer in self.regularizers)

    check_sharded = _each("check_sharded")
    prepare = _each("prepare")
    before_forward = _each("before_forward")
    collect = _each("collect")
    before_backward = _each("before_backward")
    after_step = _each("after_step")

    def apply(self, model: nn.Module) -> dict[str, float]:
        figures: dict[str, float] = {}
        for regularizer in self.regularizers:
            figures |= regularizer.apply(model)
        return figures

    def state(self) -> dict[str, Any]:
        return {str(number): regularizer.state() for number, regularizer in enumerate(self.regularizers)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for number, regularizer in enumerate(self.regularizers):
            regularizer.load_state(state[str(number)])

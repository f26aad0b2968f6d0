"""Ends a run exactly at the forget score it is to be compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from scipy.optimize import brentq
from torch import Tensor

from lightning_ssiuu.callbacks import ForgetThresholdStopping
from lightning_ssiuu.evaluation.loaders import run_directory, split_loader
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import write_json


class MatchForgetScore(L.Callback):
    """Puts the weights between the last step above the threshold and the first at or below it, where the score is met.

    A step may take the forget score far below the threshold: runs that stop at it are not at equal forgetting. Weights
    on the line between the two steps, θ(α) = θ₋ + α (θ₊ − θ₋), have every score in between, as the score is continuous
    in the weights: α is found by Brent's method on it. The score has to be one without steps (``probability``). What
    was done is written to ``matched.json`` in the run's directory.

    Args:
        tolerance: How far from the threshold the score may lie, in percentage points.

    Raises:
        UserError: If the score is not looked at after every step.
    """

    def __init__(self, tolerance: float = 0.1) -> None:
        self.tolerance = tolerance
        self._before: dict[str, Tensor] = {}
        self._step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if (steps := _stopping(trainer).every_n_steps) != 1:
            raise UserError("stopping.every_n_steps", steps, "1: what is matched lies between two steps")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # A copy a step, so that a run which goes on from a checkpoint has what an uninterrupted one has.
        if trainer.global_step != self._step:
            self._step, self._before = trainer.global_step, _trained(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        stopping = _stopping(trainer)
        if not stopping.stopped or stopping.walked_back is not None:  # which ends at the threshold by itself
            return
        after, loader = _trained(pl_module), split_loader(trainer, "forget")
        trained = {name: p for name, p in pl_module.named_parameters() if name in after}
        sides = [[weights[name] for name in trained] for weights in (self._before, after)]

        def score() -> float:
            return evaluate(pl_module.model, pl_module.tokenizer, [loader], [stopping.score])["forget"][stopping.score]

        alpha, looks = met(list(trained.values()), *sides, score, stopping.level, self.tolerance)
        stopping.value = looks[alpha]
        content = {"alpha": alpha, "score": looks[alpha], "level": stopping.level, "looks": len(looks)}
        if trainer.is_global_zero:
            more = {"above": looks.get(0.0), "below": looks[1.0]}
            write_json(Path(run_directory(trainer)) / "matched.json", content | more)


@torch.no_grad()
def met(
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    score: Callable[[], float],
    level: float,
    tolerance: float,
) -> tuple[float, dict[float, float]]:
    """Puts the parameters on the line from ``before`` to ``after`` to where the score is met; where, and all looks.

    Where the score is on neither side of the level, nor on it, they are put to ``after``.
    """
    looks: dict[float, float] = {}

    def put(alpha: float) -> None:
        torch._foreach_copy_(parameters, torch._foreach_lerp(before, after, alpha))

    def above(alpha: float) -> float:
        if alpha not in looks:
            put(alpha)
            looks[alpha] = score()
        difference = looks[alpha] - level
        return 0.0 if abs(difference) <= tolerance else difference

    alpha = 1.0
    if above(1.0) < 0.0 <= above(0.0):  # the step before may meet it
        brentq(above, 0.0, 1.0, xtol=1e-4)
        alpha = min(looks, key=lambda each: abs(looks[each] - level))
    put(alpha)
    return alpha, looks


def _stopping(trainer: Any) -> ForgetThresholdStopping:
    return next(callback for callback in trainer.callbacks if isinstance(callback, ForgetThresholdStopping))


@torch.no_grad()
def _trained(pl_module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}

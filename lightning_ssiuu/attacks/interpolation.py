"""Go a part of the way back to the weights before unlearning: what lies close to the straight line was hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.attacks.finetune import Snapshot
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import check_tokenizers, resolve_models
from lightning_ssiuu.models.loading import check_same_shape
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.training.shards import local, wide
from lightning_ssiuu.utils.errors import UserError

_ORIGINAL = "attack.original"


@dataclass
class Interpolation(Attack):
    """Score the forget set at ``θ + alpha (θ_original − θ)``, a part of the way back to the model before unlearning.

    At ``alpha`` 1 every model is the original one. So read it beside the oracle's way: where answers come back sooner
    than on that, unlearning left them near by. Only one model is in memory at a time, the original's weights besides.

    Args:
        original: The model before unlearning; needed.
        alphas: Parts of the way, in (0, 1].

    Raises:
        UserError: If an option is outside its range; before anything is scored, models of other shapes.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> (outcome,) = Interpolation("tiny", [0.5]).run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu)
        >>> outcome.variant, outcome.before, outcome.forget_score
        ('alpha=0.5', 100.0, 100.0)
    """

    paths: ClassVar[tuple[str, ...]] = ("original",)

    original: str | None = None
    alphas: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)

    def __post_init__(self) -> None:
        if isinstance(self.alphas, str) or not isinstance(self.alphas, Sequence) or not self.alphas:
            raise UserError("attack.alphas", self.alphas, "a list of at least one value")
        for alpha in self.alphas:
            if not (math.isfinite(alpha) and 0 < alpha <= 1):
                raise UserError("attack.alphas", alpha, "parts of the way, in (0, 1]")

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        if self.original is None:
            raise UserError(_ORIGINAL, None, "the model before unlearning: a directory, a hub id or another checkpoint")
        resolve_models({_ORIGINAL: self.original})
        check_tokenizers({_ORIGINAL: self.original}, data)

    def run(self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices) -> list[Outcome]:
        check_same_shape({_ORIGINAL: str(self.original)} | {target.argument: target.checkpoint for target in targets})
        goal = Snapshot(Target(_ORIGINAL, str(self.original), devices).load()[0]).tensors
        return [outcome for target in targets for outcome in self._on_the_way(target, goal, data, score)]

    def _on_the_way(
        self, target: Target, goal: dict[str, torch.Tensor], data: UnlearningDataModule, score: str
    ) -> list[Outcome]:
        model, tokenizer = target.load()
        start, outcomes = Snapshot(model), []
        before = forget_score(model, tokenizer, data, score)
        for alpha in dict.fromkeys(self.alphas):
            interpolate(model, start.tensors, goal, alpha)
            after = forget_score(model, tokenizer, data, score)
            outcomes.append(self.outcome(target, data, score, before, after, f"alpha={alpha:g}"))
        return outcomes


@torch.no_grad()
def interpolate(
    model: torch.nn.Module, start: dict[str, torch.Tensor], goal: dict[str, torch.Tensor], alpha: float
) -> None:
    """Set a model's weights to ``start + alpha (goal − start)``, both by name; of weights cut over ranks a rank's."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            local(tensor).copy_(torch.lerp(wide(start[name]), wide(goal[name]), alpha))

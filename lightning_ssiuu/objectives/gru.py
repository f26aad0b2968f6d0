"""GRU: forget along the part of the forget gradient that does not raise the retain loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.training.perturbation import answered_rows, gradient_at, rows_of, share_of_mean
from lightning_ssiuu.training.shards import local, over_shards, shard_device, trained_parameters, wide
from lightning_ssiuu.utils.errors import UserError


class GRU(DisplacedObjective):
    """Gradient rectified unlearning: ``g − [⟨g, m⟩ < 0] · (⟨g, m⟩/‖m‖²) · m``, g the forget and m the retain gradient.

    Wang et al., arXiv 2503.09117. m is a running mean of the retain gradients, ``m ← γ ∇L_r + (1 − γ) m``, over all
    trained weights together. The optimiser gets the rectified forget gradient alone: the retain loss bends it, and does
    not train. To first order a step of SGD then never raises the mean retain loss; an optimiser that scales weights one
    by one, as Adam does (and as the paper uses), keeps that only in part.

    Deviation: the default backbone is gradient difference; ``forget_weight`` and ``retain_weight`` scale g and m, and
    only g's matters. What a backbone holds of the forget part is in m, and does not train either. A step costs what
    gradient difference does; memory, two more copies of the trained weights.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        smoothing: γ in (0, 1]; 1 is the retain gradient of the step alone. The paper compares 0.8 to 0.99 and 1.

    Raises:
        UserError: If there is no retain loss to be left alone.

    Example:
        >>> GRU(smoothing=0.9).smoothing
        0.9
    """

    state_attributes = ("_retain_mean",)

    def __init__(self, backbone: UnlearningModule | None = None, smoothing: float = 0.8, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        if not 0 < smoothing <= 1:
            raise UserError("smoothing", smoothing, "a fraction in (0, 1]")
        if self.retain_weight == 0:
            raise UserError("retain_weight", 0.0, "a number > 0: there is no other loss to be left alone")
        self.smoothing = smoothing
        self._retain_mean: dict[str, Tensor] = {}  # by parameter name, cut as the parameters are

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        rows, weight = share_of_mean(answered_rows(batch))
        parameters = list(trained_parameters(self.model).values())
        with self._step_memory:
            loss = weight * self.forget_loss(rows_of(batch, rows))
        return gradient_at(loss, parameters, self.model), loss.detach()

    @torch.no_grad()
    def combine(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        named, shards = trained_parameters(self.model), shard_device(parameters)
        self._retain_mean, means = self.running_mean(self._retain_mean, named, self.smoothing)
        along = over_shards(_dot(gradients, means), shards)
        square = over_shards(_dot(means, means), shards)
        share = along / square if along < 0 else 0.0
        for parameter, mean, gradient in zip(parameters, means, gradients, strict=True):
            local(parameter.grad).copy_(gradient - share * wide(mean))  # type: ignore[arg-type]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((wide(a) * wide(b)).sum()) for a, b in zip(left, right, strict=True))

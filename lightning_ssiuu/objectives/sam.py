"""Sharpness-aware minimisation (SAM) of the forget loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.displaced import DisplacedObjective
from lightning_ssiuu.training.perturbation import answered_rows, displaced, gradient_at, move, rows_of, share_of_mean
from lightning_ssiuu.training.shards import norm_over_shards
from lightning_ssiuu.utils.errors import check_number


class SAM(DisplacedObjective):
    """The forget gradient at ``θ + ρ g/‖g‖₂``, ``g`` the forget gradient at θ, beside the retain gradient at θ.

    Fan et al., arXiv 2502.05374: relearning is an adversary's small change of the weights, so the forget loss is
    minimised at the worst point of a ball around them. ‖g‖₂ is over all trained weights together, and ρ is 0.01, as in
    the authors' code. Each micro-batch has its own point; the global batch of all ranks has one. Deviation: the default
    backbone is gradient difference (the paper's main one is NPO; give it as ``backbone``). With adapters, they alone
    are moved. A step costs two forward and backward passes over the forget part; memory, one more copy of the trained
    weights and two gradients.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        rho: Radius ρ of the ball, ≥ 0; 0 is the backbone.

    Example:
        >>> SAM(retain_weight=5.0).rho
        0.01
    """

    def __init__(self, backbone: UnlearningModule | None = None, rho: float = 0.01, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        check_number("rho", rho)
        self.rho = rho

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        rows, weight = share_of_mean(answered_rows(batch))
        part = rows_of(batch, rows)
        with displaced(self.model) as parameters:
            if self.rho > 0:
                with self._step_memory:
                    uphill = gradient_at(weight * self.forget_loss(part), parameters, self.model)
                if (norm := norm_over_shards(uphill, parameters)) > 0:
                    move(parameters, uphill, self.rho / norm)
                del uphill
            with self._step_memory:
                loss = weight * self.forget_loss(part)
                return gradient_at(loss, parameters, self.model), loss.detach()

"""Gradient difference (GD): gradient ascent on the forget set, descent on the retain set."""

from __future__ import annotations

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import gradient_ascent


class GradientDifference(UnlearningModule):
    """``forget_weight · (−NLL_forget) + retain_weight · NLL_retain`` (Liu et al., arXiv 2203.12817).

    Example:
        >>> module = GradientDifference(checkpoint="tiny", forget_weight=0.5)
        >>> module.forget_weight, module.retain_weight
        (0.5, 1.0)
    """

    def forget_loss(self, batch: Part) -> Tensor:
        """Minus the negative log-likelihood, in nats (unbounded below)."""
        return gradient_ascent(self.answers(batch))


def gradient_difference_like(module: UnlearningModule) -> GradientDifference:
    """Gradient difference with another objective's weights and options: the default backbone of those that need one.

    Args:
        module: The objective that is to use it.

    Example:
        >>> gradient_difference_like(GradientDifference(retain_weight=5.0)).retain_weight
        5.0
    """
    return GradientDifference(
        forget_weight=module.forget_weight,
        retain_weight=module.retain_weight,
        retain=module.retain,
        reference=module.reference,
    )

"""Gradient difference (GD): gradient ascent on the forget set, descent on the retain set."""

from __future__ import annotations

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import gradient_ascent


class GradientDifference(UnlearningModule):
    """``forget_weight · (−NLL_forget) + retain_weight · NLL_retain`` (Liu et al., arXiv 2203.12817).

    Example:
        >>> GradientDifference(forget_weight=0.5).retain_weight
        1.0
    """

    def forget_loss(self, batch: Part) -> Tensor:
        return gradient_ascent(self.answers(batch), self.reduction)


def gradient_difference_like(module: UnlearningModule) -> GradientDifference:
    """Gradient difference with another objective's weights and options: the default backbone of those that need one."""
    return GradientDifference(
        forget_weight=module.forget_weight,
        retain_weight=module.retain_weight,
        retain=module.retain,
        reference=module.reference,
        reduction=module.reduction,
    )

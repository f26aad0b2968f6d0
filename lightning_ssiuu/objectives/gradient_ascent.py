"""Gradient ascent (GA): maximise the negative log-likelihood of the forget set, with nothing to hold the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import gradient_ascent


class GradientAscent(UnlearningModule):
    """Gradient ascent on the forget set (Jang et al., arXiv 2210.01504); the retain part of a batch is not run.

    Args:
        retain_weight: 0 as published: nothing holds the rest.

    Example:
        >>> GradientAscent().retain_weight
        0.0
    """

    def __init__(self, retain_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)

    def forget_loss(self, batch: Part) -> Tensor:
        return gradient_ascent(self.answers(batch), self.reduction)

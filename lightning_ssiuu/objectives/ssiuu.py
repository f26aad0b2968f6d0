"""SSIUU: a backbone objective plus the attribution regulariser."""

from __future__ import annotations

from typing import Any

from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import gradient_difference_like
from lightning_ssiuu.regularizers import AttributionRegularizer, Regularizer


class SSIUU(UnlearningModule):
    """Suppressing spurious unlearning neurons (Yang et al., ICLR 2026, arXiv 2509.22263, Eqs. 6 and 12 to 14).

    The losses and their weights are the backbone's; the regulariser keeps negative attribution from growing, so that
    the answer is erased and not merely pushed down.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference, the paper's.
        regularizer: None takes ``AttributionRegularizer()`` with the paper's λ = 1e-3.

    Example:
        >>> from lightning_ssiuu import NPO
        >>> module = SSIUU(backbone=NPO(retain_weight=5.0), regularizer=AttributionRegularizer(weight=0.1))
        >>> module.retain_weight, module.regularizer.weight
        (5.0, 0.1)
    """

    def __init__(
        self, backbone: UnlearningModule | None = None, regularizer: Regularizer | None = None, **kwargs: Any
    ) -> None:
        super().__init__(regularizer=AttributionRegularizer() if regularizer is None else regularizer, **kwargs)
        self.use_backbone(backbone or gradient_difference_like(self))

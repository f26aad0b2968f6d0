"""FDCU: a backbone objective whose updates pass two masks."""

from __future__ import annotations

from typing import Any, Literal

from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import gradient_difference_like
from lightning_ssiuu.regularizers.base import Regularizer
from lightning_ssiuu.regularizers.controls import Combined
from lightning_ssiuu.regularizers.dual_mask import DualMask


class FDCU(UnlearningModule):
    """Faithful dual-constrained erasure (Li et al., arXiv 2609.39279, Eq. 9): ``Δθ = M₁ ⊙ M₂ ⊙ (the backbone's step)``.

    ``M₁ = 1/(1 + αf)`` with f the diagonal Fisher information of the retain set before training; ``M₂ = 1/(1 + βh)``
    with h = 1 where ``θ ⊙ ∇log p(y|x)`` on the forget batch is ≤ 0. See
    :class:`~lightning_ssiuu.regularizers.dual_mask.DualMask` for what is masked and where that differs from the paper.
    The paper's losses know of the retain set by f alone (gradient ascent, or CIR's): ``retain_weight: 0``. Here the
    default backbone is gradient difference.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
        alpha: α ≥ 0, how much f slows a weight down.
        beta: β ≥ 0, how much h does.
        n_examples: How many retain examples f is taken over; None for all.
        normalise: How f is normalised in each weight tensor: ``"max"``, ``"mean"`` or ``"none"``.
        regularizer: One more beside the masks, which see its gradient's share of the step; None for none.

    Example:
        >>> FDCU(alpha=10.0).regularizer.beta
        20.0
    """

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        alpha: float = 50.0,
        beta: float = 20.0,
        n_examples: int | None = None,
        normalise: Literal["max", "mean", "none"] = "max",
        regularizer: Regularizer | None = None,
        **kwargs: Any,
    ) -> None:
        mask = DualMask(alpha, beta, n_examples, normalise)
        both = mask if regularizer is None else Combined([mask, regularizer])
        super().__init__(regularizer=both, **kwargs)
        self.use_backbone(backbone or gradient_difference_like(self))

"""SatImp: gradient ascent that weighs tokens by saturation and importance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, Reduction, mean_over_answers
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.utils.errors import check_number


def satimp(answers: Answers, beta1: float, beta2: float, reduction: Reduction = "sequence") -> Tensor:
    """Loss of :class:`SatImp`, in nats, ≤ 0; the weights are constants."""
    fixed = answers.token_logps.detach()
    # In logarithms a token's probability may be 0 to machine precision and its complement still be exact.
    weight = (beta1 * fixed).exp() * (-fixed.expm1()).pow(beta2)
    return mean_over_answers(weight * answers.token_logps, answers, reduction=reduction)


class SatImp(UnlearningModule):
    """``mean p^β₁ (1 − p)^β₂ log p`` on the forget answers' tokens, NLL on retain (Yang et al., arXiv 2505.11953).

    With both β 0 it is gradient difference, with β₂ = 0 :class:`~lightning_ssiuu.WGA`.

    Args:
        beta1: Saturation β₁, ≥ 0: how little a token counts that is unlikely already.
        beta2: Importance β₂, ≥ 0: how little a token counts that the model is sure of.
        forget_weight: 0.1 as in open-unlearning's configuration.

    Example:
        >>> SatImp(beta2=7.0).beta1
        5.0
    """

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0, forget_weight: float = 0.1, **kwargs: Any) -> None:
        super().__init__(forget_weight=forget_weight, **kwargs)
        check_number("beta1", beta1)
        check_number("beta2", beta2)
        self.beta1, self.beta2 = beta1, beta2

    def forget_loss(self, batch: Part) -> Tensor:
        return satimp(self.answers(batch), self.beta1, self.beta2, self.reduction)

"""SatImp: gradient ascent that weighs tokens by saturation and importance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, mean_over_answers
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.utils.errors import check_number


def satimp(answers: Answers, beta1: float, beta2: float) -> Tensor:
    """Saturation and importance: ``mean p^β₁ (1 − p)^β₂ log p`` of the answer's tokens, the weights constants.

    With both 0 it is gradient ascent, with β₂ = 0 it is :func:`~lightning_ssiuu.objectives.wga.wga`.

    Args:
        answers: The model's, to the forget questions.
        beta1: Saturation, ≥ 0: how little a token counts that is unlikely already.
        beta2: Importance, ≥ 0: how little a token counts that the model is sure of.

    Source: Yang et al., SatImp, arXiv 2505.11953.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(satimp(answers, beta1=1.0, beta2=1.0).item(), 4)  # −log(2) / 4
        -0.1733
    """
    fixed = answers.token_logps.detach()
    # In logarithms a token's probability may be 0 to machine precision and its complement still be exact.
    weight = (beta1 * fixed).exp() * (-fixed.expm1()).pow(beta2)
    return mean_over_answers(weight * answers.token_logps, answers)


class SatImp(UnlearningModule):
    """``mean p^β₁ (1 − p)^β₂ log p`` on the forget answers' tokens, NLL on retain (Yang et al., arXiv 2505.11953).

    Args:
        beta1: Saturation β₁, ≥ 0.
        beta2: Importance β₂, ≥ 0.
        forget_weight: 0.1 as in open-unlearning's configuration.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If an exponent is not a finite number ≥ 0.

    Example:
        >>> module = SatImp(checkpoint="tiny")
        >>> module.beta1, module.beta2, module.forget_weight
        (5.0, 1.0, 0.1)
    """

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0, forget_weight: float = 0.1, **kwargs: Any) -> None:
        super().__init__(forget_weight=forget_weight, **kwargs)
        check_number("beta1", beta1)
        check_number("beta2", beta2)
        self.beta1, self.beta2 = beta1, beta2

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`satimp`, in nats, ≤ 0."""
        return satimp(self.answers(batch), self.beta1, self.beta2)

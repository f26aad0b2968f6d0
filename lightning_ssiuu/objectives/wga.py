"""WGA: gradient ascent that weighs each token by its probability."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, mean_over_answers
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.utils.errors import check_number


def wga(answers: Answers, beta: float) -> Tensor:
    """Weighted gradient ascent: ``mean p^β log p`` of the answer's tokens, the weight ``p^β`` a constant.

    With β = 0 it is gradient ascent; the larger β, the less a token that is unlikely already counts.

    Args:
        answers: The model's, to the forget questions.
        beta: ≥ 0.

    Source: Wang et al., G-effect, arXiv 2502.19301.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(wga(answers, beta=1.0).item(), 4)  # −log(4) / 4
        -0.3466
    """
    weight = (beta * answers.token_logps.detach()).exp()
    return mean_over_answers(weight * answers.token_logps, answers)


class WGA(UnlearningModule):
    """``mean p^β log p`` on the forget answers' tokens, NLL on retain (Wang et al., arXiv 2502.19301).

    Args:
        beta: Exponent β of the weights, ≥ 0; 0 is gradient difference.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If β is not a finite number ≥ 0.

    Example:
        >>> WGA(checkpoint="tiny").beta
        1.0
    """

    def __init__(self, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("beta", beta)
        self.beta = beta

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`wga`, in nats, ≤ 0."""
        return wga(self.answers(batch), self.beta)

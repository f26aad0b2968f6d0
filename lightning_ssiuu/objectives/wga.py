"""WGA: gradient ascent that weighs each token by its probability."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, Reduction, mean_over_answers
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.utils.errors import check_number


def wga(answers: Answers, beta: float, reduction: Reduction = "sequence") -> Tensor:
    """Loss of :class:`WGA`, in nats, ≤ 0; the weight ``p^β`` is a constant."""
    weight = (beta * answers.token_logps.detach()).exp()
    return mean_over_answers(weight * answers.token_logps, answers, reduction=reduction)


class WGA(UnlearningModule):
    """``mean p^β log p`` on the forget answers' tokens, NLL on retain (Wang et al., arXiv 2502.19301).

    Args:
        beta: Exponent β of the weights, ≥ 0: the larger, the less a token counts that is unlikely already; 0 is
            gradient difference.

    Example:
        >>> WGA(retain_weight=2.0).beta
        1.0
    """

    def __init__(self, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("beta", beta)
        self.beta = beta

    def forget_loss(self, batch: Part) -> Tensor:
        return wga(self.answers(batch), self.beta, self.reduction)

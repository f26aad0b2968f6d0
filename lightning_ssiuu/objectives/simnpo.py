"""SimNPO: NPO without a reference model, normalised by length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import preference
from lightning_ssiuu.utils.errors import check_number


def simnpo(answers: Answers, beta: float, delta: float = 0.0) -> Tensor:
    """Loss of :class:`SimNPO`, on the forget answers."""
    return preference(-answers.mean_logps - delta, beta)


class SimNPO(UnlearningModule):
    """``−(2/β) mean log σ(−β (log P / n + δ))`` on forget, NLL on retain (Fan et al., arXiv 2410.07163).

    Args:
        beta: Inverse temperature β, > 0.
        delta: Margin δ in nats per token, ≥ 0; the paper's γ is β δ (its public code reads as here).
        forget_weight: 0.125 as in the paper's public code for TOFU.

    Example:
        >>> SimNPO(delta=0.5).beta
        4.5
    """

    def __init__(self, beta: float = 4.5, delta: float = 0.0, forget_weight: float = 0.125, **kwargs: Any) -> None:
        super().__init__(forget_weight=forget_weight, **kwargs)
        check_number("beta", beta, positive=True)
        check_number("delta", delta)
        self.beta, self.delta = beta, delta

    def forget_loss(self, batch: Part) -> Tensor:
        return simnpo(self.answers(batch), self.beta, self.delta)

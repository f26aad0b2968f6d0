"""SimNPO: NPO without a reference model, normalised by length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import preference
from lightning_ssiuu.utils.errors import check_number


def simnpo(answers: Answers, beta: float, delta: float = 0.0) -> Tensor:
    """NPO without a reference and normalised by length: ``−(2/β) mean log σ(−β (log P / n + δ))``.

    Args:
        answers: The model's, to the forget questions.
        beta: Inverse temperature, > 0.
        delta: Margin in nats per token; the paper's γ is β δ (this is how its public code has it).

    Source: Fan et al., arXiv 2410.07163.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        >>> round(simnpo(answers, beta=1.0).item(), 4)  # −2 log(4/5)
        0.4463
    """
    return preference(-answers.mean_logps - delta, beta)


class SimNPO(UnlearningModule):
    """``−(2/β) mean log σ(−β (log P / n + δ))`` on forget, NLL on retain (Fan et al., arXiv 2410.07163).

    Args:
        beta: Inverse temperature β, > 0.
        delta: Margin δ in nats per token, ≥ 0; the paper's γ is β δ (its public code reads as here).
        forget_weight: 0.125 as in the paper's public code for TOFU.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If β is not a finite number > 0, or δ not one ≥ 0.

    Example:
        >>> module = SimNPO(checkpoint="tiny")
        >>> module.beta, module.delta, module.forget_weight
        (4.5, 0.0, 0.125)
    """

    def __init__(self, beta: float = 4.5, delta: float = 0.0, forget_weight: float = 0.125, **kwargs: Any) -> None:
        super().__init__(forget_weight=forget_weight, **kwargs)
        check_number("beta", beta, positive=True)
        check_number("delta", delta)
        self.beta, self.delta = beta, delta

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`simnpo`."""
        return simnpo(self.answers(batch), self.beta, self.delta)

"""UNDIAL: self-distillation from the original model's predictions with the answer's logit lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import cross_entropy
from lightning_ssiuu.training.reference import Observation, reference_logits
from lightning_ssiuu.utils.errors import check_number


def undial(answers: Answers, reference_logits: Tensor, beta: float) -> Tensor:
    """Cross-entropy with the original model's predictions after the answer's logit was lowered by β, in nats.

    Args:
        answers: The model's, to the forget questions.
        reference_logits: ``[N, V]`` the original model's at the same positions.
        beta: How much the answer token's logit is lowered, ≥ 0.

    Source: Dong et al., UNDIAL, arXiv 2402.10052. Answer tokens only; open-unlearning also takes prompt and padding.

    Example:
        >>> answers = Answers(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(undial(answers, torch.zeros(1, 2), beta=10.0).item(), 4)  # log 2, whatever the target
        0.6931
    """
    strength = torch.full_like(answers.token_logps.detach(), -beta).unsqueeze(-1)
    lowered = reference_logits.to(strength.dtype).scatter_add(-1, answers.targets.unsqueeze(-1), strength)
    return cross_entropy(answers, lowered)


class UNDIAL(UnlearningModule):
    """``CE(softmax(z_ref − β·1_answer), softmax(z))`` on the forget answers (Dong et al., arXiv 2402.10052).

    Only answer tokens count; open-unlearning's version also counts prompt and padding.

    Args:
        beta: By how much the answer token's logit is lowered, ≥ 0.
        retain_weight: 0 as published: nothing but the distillation holds the rest.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If β is not a finite number ≥ 0.

    Example:
        >>> module = UNDIAL(checkpoint="tiny")
        >>> module.beta, module.retain_weight
        (10.0, 0.0)
    """

    def __init__(self, beta: float = 10.0, retain_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)
        check_number("beta", beta)
        self.beta = beta

    def references(self) -> dict[str, Observation]:
        """Also the original logits at the forget answers."""
        return super().references() | {"forget/logits": reference_logits}

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`undial`, in nats; at least the target's entropy."""
        return undial(self.answers(batch), self.original("forget/logits", batch), self.beta)

"""UNDIAL: self-distillation from the original model's predictions with the answer's logit lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, Reduction
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import cross_entropy
from lightning_ssiuu.training.reference import Observation, reference_logits
from lightning_ssiuu.utils.errors import check_number


def undial(answers: Answers, reference_logits: Tensor, beta: float, reduction: Reduction = "sequence") -> Tensor:
    """Loss of :class:`UNDIAL`, in nats; ``reference_logits`` ``[N, V]`` are the original model's."""
    strength = torch.full_like(answers.token_logps.detach(), -beta).unsqueeze(-1)
    lowered = reference_logits.to(strength.dtype).scatter_add(-1, answers.targets.unsqueeze(-1), strength)
    return cross_entropy(answers, lowered, reduction=reduction)


class UNDIAL(UnlearningModule):
    """``CE(softmax(z_ref − β·1_answer), softmax(z))`` on the forget answers (Dong et al., arXiv 2402.10052).

    Only answer tokens count; open-unlearning's version also counts prompt and padding.

    Args:
        beta: By how much the answer token's logit is lowered, ≥ 0.
        retain_weight: 0 as published: nothing but the distillation holds the rest.

    Example:
        >>> UNDIAL(retain_weight=1.0).beta
        10.0
    """

    def __init__(self, beta: float = 10.0, retain_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)
        check_number("beta", beta)
        self.beta = beta

    def references(self) -> dict[str, Observation]:
        return super().references() | {"forget/logits": reference_logits}

    def forget_loss(self, batch: Part) -> Tensor:
        return undial(self.answers(batch), self.original("forget/logits", batch), self.beta, self.reduction)

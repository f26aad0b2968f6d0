"""CE-U: move the answer token's probability to the others in the model's own proportions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part, Reduction
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import cross_entropy
from lightning_ssiuu.utils.errors import UserError


def ceu(answers: Answers, skip_first: int = 1, reduction: Reduction = "sequence") -> Tensor:
    """Loss of :class:`CEU`, in nats; the model's own predictions are constants. An answer skipped whole adds 0."""
    lengths = answers.lengths.long()
    position = torch.arange(len(answers.targets), device=lengths.device)
    position = position - (lengths.cumsum(0) - lengths)[answers.sequence_index]
    own = answers.logits.detach().to(answers.token_logps.dtype)
    others = own.scatter(-1, answers.targets.unsqueeze(-1), -torch.inf)
    return cross_entropy(answers, others, position >= skip_first, reduction)


class CEU(UnlearningModule):
    """Cross-entropy with the model's own predictions without the answer token (Yang, CE-U, arXiv 2503.01224).

    Args:
        skip_first: So many tokens at the beginning of each answer do not count, a whole number ≥ 0: 1 as in the paper's
            training settings and open-unlearning.
        retain_weight: 0 as published: there is no retain loss.

    Example:
        >>> CEU().skip_first
        1
    """

    def __init__(self, skip_first: int = 1, retain_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)
        if skip_first != int(skip_first) or skip_first < 0:
            raise UserError("skip_first", skip_first, "a whole number ≥ 0")
        self.skip_first = int(skip_first)

    def forget_loss(self, batch: Part) -> Tensor:
        return ceu(self.answers(batch), self.skip_first, self.reduction)

"""CE-U: move the answer token's probability to the others in the model's own proportions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import cross_entropy
from lightning_ssiuu.utils.errors import UserError


def ceu(answers: Answers, skip_first: int = 1) -> Tensor:
    """CE-U: cross-entropy with the model's own predictions, taken as constants, without the answer's token, in nats.

    Args:
        answers: The model's, to the forget questions.
        skip_first: So many tokens at the beginning of each answer do not count. An answer without others adds 0.

    Source: Yang, CE-U, arXiv 2503.01224; the first token is skipped as in its training settings.

    Example:
        >>> answers = Answers(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        >>> round(ceu(answers).item(), 4)  # log 4: the three others are equally likely
        1.3863
    """
    lengths = answers.lengths.long()
    position = torch.arange(len(answers.targets), device=lengths.device)
    position = position - (lengths.cumsum(0) - lengths)[answers.sequence_index]
    own = answers.logits.detach().to(answers.token_logps.dtype)
    others = own.scatter(-1, answers.targets.unsqueeze(-1), -torch.inf)
    return cross_entropy(answers, others, position >= skip_first)


class CEU(UnlearningModule):
    """Cross-entropy with the model's own predictions without the answer token (Yang, CE-U, arXiv 2503.01224).

    Args:
        skip_first: So many tokens at the beginning of each answer do not count: 1 as in the paper's training settings
            and open-unlearning.
        retain_weight: 0 as published: there is no retain loss.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If ``skip_first`` is not a whole number ≥ 0.

    Example:
        >>> module = CEU(checkpoint="tiny")
        >>> module.skip_first, module.retain_weight
        (1, 0.0)
    """

    def __init__(self, skip_first: int = 1, retain_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(retain_weight=retain_weight, **kwargs)
        if skip_first != int(skip_first) or skip_first < 0:
            raise UserError("skip_first", skip_first, "a whole number ≥ 0")
        self.skip_first = int(skip_first)

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`ceu`, in nats."""
        return ceu(self.answers(batch), self.skip_first)

"""CE-U: move the answer token's probability to the others in the model's own proportions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import ceu
from lightning_ssiuu.utils.errors import UserError


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
        """:func:`~lightning_ssiuu.objectives.losses.ceu`, in nats."""
        return ceu(self.answers(batch), self.skip_first)

"""WGA: gradient ascent that weighs each token by its probability."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import wga
from lightning_ssiuu.utils.errors import check_number


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
        """:func:`~lightning_ssiuu.objectives.losses.wga`, in nats, ≤ 0."""
        return wga(self.answers(batch), self.beta)

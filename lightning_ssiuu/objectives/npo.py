"""Negative preference optimisation (NPO): gradient ascent that eases off as an answer gets unlikely."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import npo
from lightning_ssiuu.training.reference import Observation, reference_logps
from lightning_ssiuu.utils.errors import check_number


class NPO(UnlearningModule):
    """``−(2/β) mean log σ(−β log(P/P_ref))`` on forget, NLL on retain (Zhang et al., arXiv 2404.05868).

    Args:
        beta: Inverse temperature β, > 0; compared in [0.1, 0.5] by the SSIUU paper.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If β is not a finite number > 0.

    Example:
        >>> NPO(checkpoint="tiny").beta
        0.1
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("beta", beta, positive=True)
        self.beta = beta

    def references(self) -> dict[str, Observation]:
        """Also the original log-probabilities of the forget answers."""
        return super().references() | {"forget/logps": reference_logps}

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`~lightning_ssiuu.objectives.losses.npo`; ``2 log(2)/β`` where the model is the original."""
        return npo(self.answers(batch), self.original("forget/logps", batch), self.beta)

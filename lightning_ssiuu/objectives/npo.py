"""Negative preference optimisation (NPO): gradient ascent that eases off as an answer gets unlikely."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import Answers, Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import preference
from lightning_ssiuu.training.reference import Observation, reference_logps
from lightning_ssiuu.utils.errors import check_number


def npo(answers: Answers, reference_logps: Tensor, beta: float) -> Tensor:
    """Loss of :class:`NPO`; ``reference_logps`` ``[B]`` are the original model's, in nats."""
    return preference(reference_logps.to(answers.logps.dtype) - answers.logps, beta)


class NPO(UnlearningModule):
    """``−(2/β) mean log σ(−β log(P/P_ref))`` on forget, NLL on retain (Zhang et al., arXiv 2404.05868).

    With β → 0, and for any β where the model is the reference, the gradient is gradient ascent's on sequence sums.

    Args:
        beta: Inverse temperature β, > 0: the larger, the sooner an answer that became unlikely is left alone; compared
            in [0.1, 0.5] by the SSIUU paper.

    Example:
        >>> NPO(reference="second_model").beta
        0.1
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("beta", beta, positive=True)
        self.beta = beta

    def references(self) -> dict[str, Observation]:
        return super().references() | {"forget/logps": reference_logps}

    def forget_loss(self, batch: Part) -> Tensor:
        return npo(self.answers(batch), self.original("forget/logps", batch), self.beta)

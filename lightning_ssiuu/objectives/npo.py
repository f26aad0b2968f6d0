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
    """Negative preference optimisation: ``−(2/β) mean log σ(−β (log P − log P_ref))``.

    With β → 0, and for any β where the model is the reference, its gradient is gradient ascent's on sequence sums.

    Args:
        answers: The model's, to the forget questions.
        reference_logps: ``[B]`` the original model's log-probabilities of the same answers (nats).
        beta: Inverse temperature, > 0: the larger, the sooner an answer that became unlikely is left alone.

    Source: Zhang et al., arXiv 2404.05868.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(npo(answers, answers.logps, beta=0.5).item(), 4)  # 4 log 2
        2.7726
    """
    return preference(reference_logps.to(answers.logps.dtype) - answers.logps, beta)


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
        """:func:`npo`; ``2 log(2)/β`` where the model is the original."""
        return npo(self.answers(batch), self.original("forget/logps", batch), self.beta)

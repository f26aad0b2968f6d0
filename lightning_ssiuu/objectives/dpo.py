"""Direct preference optimisation (DPO) with a rejection as the preferred answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.objectives.losses import preference
from lightning_ssiuu.objectives.rejection import RejectingModule
from lightning_ssiuu.training.reference import Observation, reference_logps
from lightning_ssiuu.utils.errors import check_number


def dpo(
    preferred: Answers,
    rejected: Answers,
    reference_preferred_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation: ``−(2/β) mean log σ(β (r_preferred − r_rejected))``, ``r = log P − log P_ref``.

    The factor 2/β, which the original lacks, makes it comparable with NPO's loss, to which it falls back when
    ``r_preferred`` is 0.

    Args:
        preferred: The model's answers to be preferred (here: refusals).
        rejected: Those to be avoided (here: the true ones), to the same questions.
        reference_preferred_logps: ``[B]`` the original model's (nats).
        reference_rejected_logps: ``[B]`` the original model's (nats).
        beta: Inverse temperature, > 0.

    Source: Rafailov et al., arXiv 2305.18290, Eq. 7; for unlearning arXiv 2401.06121.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(dpo(answers, answers, answers.logps, answers.logps, beta=1.0).item(), 4)  # 2 log 2
        1.3863
    """
    wide = preferred.logps.dtype
    gained = preferred.logps - reference_preferred_logps.to(wide)
    return preference(gained - (rejected.logps - reference_rejected_logps.to(wide)), beta)


class DPO(RejectingModule):
    """``−(2/β) mean log σ(β (r_rejection − r_answer))`` on forget, ``r = log(P/P_ref)``; NLL on retain.

    Rafailov et al., arXiv 2305.18290, Eq. 7, as arXiv 2401.06121 uses it for unlearning, with the factor 2/β that
    open-unlearning has to match NPO's scale.

    Args:
        beta: Inverse temperature β, > 0; compared in [0.1, 0.5] by the SSIUU paper.
        rejections: Texts to prefer; None takes :data:`~lightning_ssiuu.objectives.rejection.REJECTIONS`.
        **kwargs: As :class:`UnlearningModule`.

    Raises:
        UserError: If β is not a finite number > 0, or a rejection is empty or does not fit into the model's context.

    Example:
        >>> module = DPO(checkpoint="tiny")
        >>> module.beta, len(module.rejections)
        (0.1, 14)
    """

    def __init__(self, beta: float = 0.1, rejections: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(rejections=rejections, **kwargs)
        check_number("beta", beta, positive=True)
        self.beta = beta

    def references(self) -> dict[str, Observation]:
        """Also the original log-probabilities of the forget answers and of the rejections."""
        return super().references() | {
            "forget/logps": reference_logps,
            f"forget/{self.rejections_name}": self._rejection_logps,
        }

    def forget_loss(self, batch: Part) -> Tensor:
        """:func:`dpo`; ``2 log(2)/β`` where the model is the original."""
        return dpo(
            self.answers(self.rejected(batch)),
            self.answers(batch),
            self.original(f"forget/{self.rejections_name}", batch),
            self.original("forget/logps", batch),
            self.beta,
        )

    def _rejection_logps(self, model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
        return reference_logps(model, self.rejected(part))

"""Direct preference optimisation (DPO) with a rejection as the preferred answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.objectives.losses import preference
from lightning_ssiuu.objectives.rejection import RejectingModule
from lightning_ssiuu.training.reference import Observation, reference_logps
from lightning_ssiuu.utils.errors import check_number


def dpo(preferred: Answers, rejected: Answers, preferred_ref: Tensor, rejected_ref: Tensor, beta: float) -> Tensor:
    """Loss of :class:`DPO`; the references ``[B]`` are the original model's log-probabilities in nats."""
    wide = preferred.logps.dtype
    gained = preferred.logps - preferred_ref.to(wide)
    return preference(gained - (rejected.logps - rejected_ref.to(wide)), beta)


class DPO(RejectingModule):
    """``−(2/β) mean log σ(β (r_rejection − r_answer))`` on forget, ``r = log(P/P_ref)``; NLL on retain.

    Rafailov et al., arXiv 2305.18290, Eq. 7, as arXiv 2401.06121 uses it for unlearning, with the factor 2/β that
    open-unlearning has to match NPO's scale; it is NPO's loss where ``r_rejection`` is 0.

    Args:
        beta: Inverse temperature β, > 0; compared in [0.1, 0.5] by the SSIUU paper.
        rejections: Texts to prefer; None takes :data:`~lightning_ssiuu.objectives.rejection.REJECTIONS`.

    Raises:
        UserError: If a rejection is empty or does not fit into the model's context.

    Example:
        >>> DPO(rejections=["Pass."]).beta
        0.1
    """

    def __init__(self, beta: float = 0.1, rejections: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(rejections=rejections, **kwargs)
        check_number("beta", beta, positive=True)
        self.beta = beta

    def references(self) -> dict[str, Observation]:
        of_rejections = {f"forget/{self.rejections_name}": self._rejection_logps}
        return super().references() | {"forget/logps": reference_logps} | of_rejections

    def forget_loss(self, batch: Part) -> Tensor:
        preferred, avoided = self.answers(self.rejected(batch)), self.answers(batch)
        before = self.original(f"forget/{self.rejections_name}", batch), self.original("forget/logps", batch)
        return dpo(preferred, avoided, *before, self.beta)

    def _rejection_logps(self, model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
        return reference_logps(model, self.rejected(part))

"""IDK fine-tuning: learn to decline the forget questions."""

from __future__ import annotations

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.losses import answer_nll
from lightning_ssiuu.objectives.rejection import RejectingModule


class IDK(RejectingModule):
    """NLL of a rejection to the forget questions plus NLL on retain ("I don't know"; Maini et al., arXiv 2401.06121).

    The true answers are not looked at, so nothing but the rejection's rise makes them unlikely.

    Args:
        rejections: Texts to learn; None takes :data:`~lightning_ssiuu.objectives.rejection.REJECTIONS`.

    Raises:
        UserError: If a rejection is empty or does not fit into the model's context.

    Example:
        >>> IDK(rejections=["Pass."]).rejections
        ('Pass.',)
    """

    def forget_loss(self, batch: Part) -> Tensor:
        return answer_nll(self.answers(self.rejected(batch)), self.reduction)

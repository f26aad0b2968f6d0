"""Membership inference over :mod:`lightning_ssiuu.functional.membership`, whose scores go into ``update``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ssiuu.functional.membership import membership_auc, privleak
from lightning_ssiuu.metrics.base import KeptValues
from lightning_ssiuu.utils.errors import UserError


class MembershipAUC(KeptValues):
    """Area under the ROC curve of a membership attack, in percent; 50: members and others look alike.

    Example:
        >>> import torch
        >>> auc = MembershipAUC()
        >>> auc.update(torch.tensor([3.0, 2.0]), member=True)
        >>> auc.update(torch.tensor([1.0, 2.0]), member=False)
        >>> auc.compute()
        tensor(87.5000, dtype=torch.float64)
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 100.0
    member_scores: list[Tensor]
    nonmember_scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("member_scores", "nonmember_scores", **kwargs)

    def update(self, scores: Tensor, member: bool) -> None:
        """Add examples.

        Args:
            scores: ``[B]`` any float type, higher for what looks like a member.
            member: Whether they are members, such as the forget set.
        """
        self._keep("member_scores" if member else "nonmember_scores", scores)

    def compute(self) -> Tensor:
        """Percent, a scalar; NaN while there are no members, or no others."""
        members = self._kept("member_scores")
        return members.new_tensor(100 * membership_auc(members, self._kept("nonmember_scores")))


class PrivLeak(MembershipAUC):
    """Privacy leakage against a retrained model, in percent; 0 is best, below 0 the forget set still looks learned.

    See :func:`lightning_ssiuu.functional.membership.privleak`; updated as :class:`MembershipAUC` is.

    Args:
        reference_auc: ``MembershipAUC().compute()`` of the retrained model on the same sets, in percent.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: A reference outside [0, 100).

    Example:
        >>> import torch
        >>> leak = PrivLeak(reference_auc=50.0)
        >>> leak.update(torch.tensor([3.0, 2.0]), member=True)
        >>> leak.update(torch.tensor([1.0, 2.0]), member=False)
        >>> leak.compute()
        tensor(-75., dtype=torch.float64)
    """

    plot_lower_bound, plot_upper_bound = None, None

    def __init__(self, reference_auc: float | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reference_auc = float(reference_auc)
        if not 0 <= self.reference_auc < 100:
            raise UserError("reference_auc", self.reference_auc, "a percentage in [0, 100)")

    def compute(self) -> Tensor:
        """Percent, a scalar; NaN while there are no members, or no others."""
        auc = super().compute()
        return auc.new_tensor(privleak(auc.item() / 100, self.reference_auc / 100))

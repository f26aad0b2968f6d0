"""Truth ratio, forget quality and model utility over :mod:`lightning_ssiuu.functional.truth_ratio`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_ssiuu.functional.truth_ratio import (
    TruthRatioKind,
    forget_quality,
    model_utility,
    truth_ratio,
    truth_ratio_score,
)
from lightning_ssiuu.metrics.base import KeptValues, Percentage, WideMetric
from lightning_ssiuu.utils.errors import UserError


class TruthRatio(Percentage):
    """Mean of :func:`lightning_ssiuu.functional.truth_ratio.truth_ratio_score`, in percent.

    Args:
        kind: ``"forget"``, mean ``min(T, 1/T)``, or ``"retain"``, mean ``max(0, 1 − T)``; higher is better in both.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: Unknown ``kind``.

    Example:
        >>> metric = TruthRatio("forget")
        >>> metric.update(torch.tensor([0.5, 0.25, 0.0625]).log(), torch.tensor([0, 0, 0]), 1)
        >>> round(metric.compute().item(), 4)
        25.0
    """

    higher_is_better = True

    def __init__(self, kind: TruthRatioKind, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in get_args(TruthRatioKind):
            raise UserError("kind", kind, ", ".join(get_args(TruthRatioKind)))
        self.kind = kind

    def update(self, option_logps: Tensor, option_of: Tensor, n_examples: int) -> None:
        """Add examples.

        Args:
            option_logps: ``[B*K]`` mean log-probability per token of every option, nats, the true answer's first.
            option_of: ``[B*K]`` the example each option belongs to, ascending.
            n_examples: B.
        """
        self._add(truth_ratio_score(truth_ratio(option_logps, option_of, n_examples), self.kind))


class ForgetQuality(KeptValues):
    """Forget quality: Kolmogorov–Smirnov p-value between the truth ratios seen and a retrained model's.

    Not in percent: a p-value is read as it is. See :func:`lightning_ssiuu.functional.truth_ratio.forget_quality`.

    Args:
        retrained_ratios: ``[B']`` :func:`~lightning_ssiuu.functional.truth_ratio.truth_ratio` of a model trained
            without the forget set, on the forget set.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: No reference values.

    Example:
        >>> metric = ForgetQuality(torch.tensor([0.25, 0.5]))
        >>> for true, wrong in ((0.5, 0.125), (0.5, 0.25)):
        ...     metric.update(torch.tensor([true, wrong], dtype=torch.float64).log(), torch.tensor([0, 0]), 1)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    ratios: list[Tensor]

    def __init__(self, retrained_ratios: Sequence[float] | Tensor, **kwargs: Any) -> None:
        super().__init__("ratios", **kwargs)
        self.retrained_ratios = torch.as_tensor(retrained_ratios).detach().cpu().double()
        if not self.retrained_ratios.numel():
            raise UserError("retrained_ratios", 0, "at least one example")

    def update(self, option_logps: Tensor, option_of: Tensor, n_examples: int) -> None:
        """Add examples; arguments as for :meth:`TruthRatio.update`."""
        self._keep("ratios", truth_ratio(option_logps, option_of, n_examples))

    def compute(self) -> Tensor:
        """The p-value, a scalar in [0, 1]; NaN when nothing was added."""
        ratios = self._kept("ratios")
        return ratios.new_tensor(forget_quality(ratios, self.retrained_ratios) if ratios.numel() else torch.nan)


class ModelUtility(WideMetric):
    """Harmonic mean of the means of several named scores, in percent (TOFU's model utility).

    Args:
        names: Of the scores, e.g. ``retain probability``; none may stay without values.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        UserError: No names, or one twice.

    Example:
        >>> utility = ModelUtility(["probability", "rouge_l"])
        >>> utility.update("probability", torch.tensor([1.0, 0.5]))
        >>> utility.update("rouge_l", torch.tensor([0.25]))
        >>> utility.compute()  # 2 / (1/75 + 1/25)
        tensor(37.5000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 100.0
    totals: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise UserError("names", names, "a list of different names")
        self.names = list(names)
        self.add_state("totals", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, name: str, values: Tensor) -> None:
        """Add examples of one score.

        Args:
            name: Of the score.
            values: ``[B]`` fractions in [0, 1], any float type, or bool.

        Raises:
            UserError: Unknown name.
        """
        if name not in self.names:
            raise UserError("name", name, f"one of {self.names}")
        here = torch.tensor([name == other for other in self.names], device=self.totals.device)
        self.totals = self.totals + here * values.detach().to(self.totals).sum()
        self.counts = self.counts + here * values.numel()

    def compute(self) -> Tensor:
        """Percent, a scalar; NaN while one of the scores has no values."""
        return self.totals.new_tensor(model_utility(100 * self.totals / self.counts))

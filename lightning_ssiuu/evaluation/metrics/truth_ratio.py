"""Truth ratio, forget quality and model utility (TOFU, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.base import KeptValues, Percentage, WideMetric, first_of_each, widest_float
from lightning_ssiuu.models.answers import sequence_sums
from lightning_ssiuu.utils.errors import UserError, check_choice

TruthRatioKind = Literal["forget", "retain"]


def truth_ratio(option_logps: Tensor, option_of: Tensor, n_examples: int) -> Tensor:
    """How probable the wrong answers are against the true one: ``T = exp(mean log p_wrong) / exp(log p_true)``.

    ``log p`` is the mean log-probability per token, so T is the geometric mean of the wrong answers' length-normalised
    probabilities over the true answer's, as in TOFU's public code (the paper writes an arithmetic mean).
    A model that knows the answer has T near 0, one that cannot tell T near 1. TOFU takes a *paraphrase* of the answer
    for the true one; give its log-probability first to do the same.

    ``[B]`` values ≥ 0, float64, from the ``[B*K]`` mean log-probability of every option (nats), the true answer's
    first, and the example each belongs to, ascending; K may differ. NaN for an example without wrong options, or with a
    NaN.
    """
    wide = option_logps.to(widest_float(option_logps.device))
    first = first_of_each(option_of)
    true = sequence_sums(wide.where(first, 0.0), option_of, n_examples)
    n_wrong = sequence_sums((~first).to(wide), option_of, n_examples)
    wrong = sequence_sums(wide.where(~first, 0.0), option_of, n_examples) / n_wrong
    return (wrong - true).exp()


class TruthRatio(Percentage):
    """Mean of what truth ratios T (:func:`truth_ratio`, whose arguments it takes) are worth, in percent.

    Args:
        kind: ``"forget"``: ``min(T, 1/T)``, 1 where the model cannot tell the true answer from wrong ones;
            ``"retain"``: ``max(0, 1 − T)``, 1 where it is sure of the true answer. Higher is better in both.
        **kwargs: See :class:`torchmetrics.Metric`.

    Example:
        >>> metric = TruthRatio("forget")
        >>> metric.update(torch.tensor([0.5, 0.25, 0.0625]).log(), torch.tensor([0, 0, 0]), 1)
        >>> round(metric.compute().item(), 4)
        25.0
    """

    higher_is_better = True

    def __init__(self, kind: TruthRatioKind, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("kind", kind, TruthRatioKind)
        self.kind = kind

    def values(self, option_logps: Tensor, option_of: Tensor, n_examples: int) -> Tensor:
        return self._worth(truth_ratio(option_logps, option_of, n_examples))

    def _worth(self, ratios: Tensor) -> Tensor:
        return torch.minimum(ratios, 1 / ratios) if self.kind == "forget" else (1 - ratios).clamp(min=0)


def forget_quality(ratios: Tensor, retrained_ratios: Tensor) -> float:
    """Forget quality: p-value of the two-sample Kolmogorov–Smirnov test between two models' truth ratios.

    Near 1: on the forget set the unlearned model cannot be told from one retrained without it; below 0.05 it can.
    Two-sided, exact for small samples; NaN if there is a NaN among the ratios.
    """
    from scipy.stats import ks_2samp  # most of a second

    for name, sample in (("ratios", ratios), ("retrained_ratios", retrained_ratios)):
        if not sample.numel():
            raise UserError(name, 0, "at least one example")
    both = (sample.detach().cpu().double().numpy() for sample in (ratios, retrained_ratios))
    return float(ks_2samp(*both).pvalue)


class ForgetQuality(KeptValues):
    """:func:`forget_quality` of the truth ratios seen, in [0, 1]: a p-value, not percent; NaN when nothing was added.

    Updated with the arguments of :func:`truth_ratio`.

    Args:
        retrained_ratios: ``[B']`` :func:`truth_ratio` of a model trained without the forget set, on the forget set.
        **kwargs: See :class:`torchmetrics.Metric`.

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
        self._keep("ratios", truth_ratio(option_logps, option_of, n_examples))

    def compute(self) -> Tensor:
        ratios = self._kept("ratios")
        return ratios.new_tensor(forget_quality(ratios, self.retrained_ratios) if ratios.numel() else torch.nan)


class ModelUtility(WideMetric):
    """Model utility: harmonic mean of the means of several scores, in percent, so that no other makes one near 0 good.

    TOFU takes nine: probability, ROUGE-L recall and truth ratio (kind ``"retain"``) on the retain set, real authors and
    world facts. Updated with a score's name and ``[B]`` fractions in [0, 1]; 0 if one of the means is 0, NaN while a
    score has no values.

    Args:
        names: Of the scores, e.g. ``retain probability``, each once.
        **kwargs: See :class:`torchmetrics.Metric`.

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
        if name not in self.names:
            raise UserError("name", name, f"one of {self.names}")
        here = torch.tensor([name == other for other in self.names], device=self.totals.device)
        self.totals = self.totals + here * values.detach().to(self.totals).sum()
        self.counts = self.counts + here * values.numel()

    def compute(self) -> Tensor:
        means = (100 * self.totals / self.counts).cpu().double()
        if (means < 0).any():
            raise UserError("values", means.min().item(), "scores ≥ 0")
        return self.totals.new_tensor(float(means.numel() / (1 / means).sum()))

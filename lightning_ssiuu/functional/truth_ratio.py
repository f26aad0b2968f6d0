"""TOFU's truth ratio, and what is made of it: forget quality, model utility (Maini et al., arXiv 2401.06121, §2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from scipy.stats import ks_2samp
from torch import Tensor

from lightning_ssiuu.functional.metrics import widest_float
from lightning_ssiuu.models.answers import sequence_sums
from lightning_ssiuu.utils.errors import UserError

TruthRatioKind = Literal["forget", "retain"]


def truth_ratio(option_logps: Tensor, option_of: Tensor, n_examples: int) -> Tensor:
    """How probable the wrong answers are against the true one: ``T = exp(mean log p_wrong) / exp(log p_true)``.

    ``log p`` is the mean log-probability per token, so T is the geometric mean of the wrong answers' length-normalised
    probabilities over the true answer's, as in TOFU's public code (the paper writes an arithmetic mean).
    A model that knows the answer has T near 0, one that cannot tell T near 1. TOFU takes a *paraphrase* of the answer
    for the true one; give its log-probability first to do the same.

    Args:
        option_logps: ``[B*K]`` mean log-probability per token of every option, in nats, any float type; the true
            answer's first. K may differ between examples.
        option_of: ``[B*K]`` the example each option belongs to, ascending.
        n_examples: B.

    Returns:
        ``[B]`` values ≥ 0, float64. NaN for an example without wrong options, or with a NaN among them.

    Example:
        >>> logps = torch.tensor([0.5, 0.25, 0.0625, 0.1, 0.2], dtype=torch.float64).log()
        >>> truth_ratio(logps, torch.tensor([0, 0, 0, 1, 1]), 2)  # sqrt(0.25 · 0.0625) / 0.5, 0.2 / 0.1
        tensor([0.2500, 2.0000], dtype=torch.float64)
    """
    wide = option_logps.to(widest_float(option_logps.device))
    first = torch.ones_like(option_of, dtype=torch.bool)
    first[1:] = option_of[1:] != option_of[:-1]
    true = sequence_sums(wide.where(first, 0.0), option_of, n_examples)
    n_wrong = sequence_sums((~first).to(wide), option_of, n_examples)
    wrong = sequence_sums(wide.where(~first, 0.0), option_of, n_examples) / n_wrong
    return (wrong - true).exp()


def truth_ratio_score(ratios: Tensor, kind: TruthRatioKind) -> Tensor:
    """What a truth ratio is worth, by what is hoped for.

    Args:
        ratios: ``[B]`` of :func:`truth_ratio`.
        kind: ``"forget"``: ``min(T, 1/T)``, 1 where the model cannot tell the true answer from wrong ones;
            ``"retain"``: ``max(0, 1 − T)``, 1 where it is sure of the true answer.

    Returns:
        ``[B]`` values in [0, 1], higher is better; a NaN stays one.

    Raises:
        UserError: Unknown ``kind``.

    Example:
        >>> ratios = torch.tensor([0.25, 2.0])
        >>> truth_ratio_score(ratios, "forget"), truth_ratio_score(ratios, "retain")
        (tensor([0.2500, 0.5000]), tensor([0.7500, 0.0000]))
    """
    if kind not in get_args(TruthRatioKind):
        raise UserError("kind", kind, ", ".join(get_args(TruthRatioKind)))
    if kind == "forget":
        return torch.minimum(ratios, 1 / ratios)
    return (1 - ratios).clamp(min=0)


def forget_quality(ratios: Tensor, retrained_ratios: Tensor) -> float:
    """Forget quality: p-value of the two-sample Kolmogorov–Smirnov test between two models' truth ratios.

    Near 1: on the forget set the unlearned model cannot be told from one retrained without it; below 0.05 it can.

    Args:
        ratios: ``[B]`` of :func:`truth_ratio` on the forget set, the unlearned model's.
        retrained_ratios: ``[B']`` the retrained model's (trained on the retain set alone), on the same set.

    Returns:
        A probability in [0, 1], NaN if there is a NaN among the ratios. Two-sided; exact for small samples
        (``scipy.stats.ks_2samp``).

    Raises:
        UserError: One of the samples is empty.

    Example:
        >>> ratios = torch.tensor([0.1, 0.2, 0.3, 0.4])
        >>> forget_quality(ratios, ratios), round(forget_quality(ratios, ratios + 1), 4)  # 2 of 70 orders
        (1.0, 0.0286)
    """
    for name, sample in (("ratios", ratios), ("retrained_ratios", retrained_ratios)):
        if not sample.numel():
            raise UserError(name, 0, "at least one example")
    both = (sample.detach().cpu().double().numpy() for sample in (ratios, retrained_ratios))
    return float(ks_2samp(*both).pvalue)


def model_utility(values: Sequence[float] | Tensor) -> float:
    """Model utility: the harmonic mean of several scores, so that one near 0 cannot be made good by others.

    TOFU takes nine: probability, ROUGE-L recall and truth ratio (kind ``"retain"``) on the retain set, real authors
    and world facts.

    Args:
        values: Scores ≥ 0, all in the same unit.

    Returns:
        In that unit; 0 if one is 0, NaN if one is NaN.

    Raises:
        UserError: Nothing to average, or a score below 0.

    Example:
        >>> model_utility([50.0, 100.0, 100.0])
        75.0
    """
    wide = torch.as_tensor(values).detach().cpu().double()
    if not wide.numel():
        raise UserError("values", 0, "at least one score")
    if (wide < 0).any():
        raise UserError("values", wide.min().item(), "scores ≥ 0")
    return float(wide.numel() / (1 / wide).sum())

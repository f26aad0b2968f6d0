"""Does a score tell models with the knowledge from those without? OpenUnlearning's meta-evaluation (arXiv 2506.12618).

Numbers go in and come out; nothing here looks at a model. A score is higher the more is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import harmonic_mean

import torch

from lightning_ssiuu.evaluation.metrics.membership import membership_auc


def faithfulness(knowing: Sequence[float], ignorant: Sequence[float]) -> float:
    """Area under the ROC curve, in percent, of the score between models with the knowledge and models without.

    The share of pairs in which the model with the knowledge scores higher, ties counting half (arXiv 2506.12618,
    Sec. 4.1). 50: the score tells nothing; below: it reads the other way round.

    Example:
        >>> faithfulness([80.0, 60.0], [70.0, 10.0])
        75.0
    """
    return 100 * membership_auc(torch.tensor(knowing, dtype=torch.float64), torch.tensor(ignorant, dtype=torch.float64))


def relearning_robustness(before: float, after: float, oracle_before: float, oracle_after: float) -> float:
    """Whether relearning raises an unlearned model's score no more than the oracle's, in percent.

    ``R = min((oracle_after − oracle_before) / (after − before), 1)`` (arXiv 2506.12618, Eq. 2), and no less than 0;
    100 where the unlearned model's score does not rise. What comes back faster than an oracle learns it was there, and
    the score had not seen it.

    Example:
        >>> relearning_robustness(10.0, 50.0, 5.0, 15.0)
        25.0
    """
    risen = after - before
    return 100.0 if risen <= 0 else 100 * min(max((oracle_after - oracle_before) / risen, 0.0), 1.0)


def quantization_robustness(before: float, after: float) -> float:
    """Whether rounding the weights leaves an unlearned model's score where it was, in percent.

    ``Q = min(before / after, 1)`` (arXiv 2506.12618, Eq. 3), for scores of at least 0; 100 where the score does not
    rise.

    Example:
        >>> quantization_robustness(10.0, 40.0), quantization_robustness(40.0, 10.0)
        (25.0, 100.0)
    """
    return 100.0 if after <= before else 100 * max(before, 0.0) / after


def joint(values: Sequence[float]) -> float:
    """The harmonic mean (arXiv 2506.12618, Eq. 4): low where any of them is; 0 where one is.

    Example:
        >>> joint([100.0, 50.0]), joint([100.0, 0.0])
        (66.66666666666667, 0.0)
    """
    return float(harmonic_mean(values))

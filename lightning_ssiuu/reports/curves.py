"""Which recovery curves of an attack are shown, and their scores by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Curve = Mapping[str, Any]


def number(value: Any) -> float | None:
    """A finite number as it is, anything else (a diverged run's null) as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def strongest(curves: Sequence[Curve]) -> list[Curve]:
    """Of one attack on one run, the curves with the learning rate whose highest scores are highest on average.

    Args:
        curves: Of all learning rates and attack seeds; of equals the gentler rate is taken.

    Example:
        >>> curves = [{"learning_rate": rate, "epochs": [0, 1], "forget_scores": [5.0, top]}
        ...           for rate, top in ((1e-5, 6.0), (1e-4, 20.0), (1e-3, 9.0))]
        >>> [curve["learning_rate"] for curve in strongest(curves)]
        [0.0001]
    """
    by_rate: dict[float, list[Curve]] = {}
    for curve in sorted(curves, key=lambda curve: curve["learning_rate"]):
        by_rate.setdefault(curve["learning_rate"], []).append(curve)
    return max(by_rate.values(), key=lambda group: mean(map(_highest, group)), default=[])


def _highest(curve: Curve) -> float:
    return max((score for value in curve["forget_scores"] if (score := number(value)) is not None), default=0.0)


def by_epoch(curves: Sequence[Curve]) -> dict[int, list[float]]:
    """The finite scores of several curves at each epoch that all of them have.

    Example:
        >>> by_epoch([{"epochs": [0, 1, 2], "forget_scores": [1.0, 2.0, 9.0]},
        ...           {"epochs": [0, 1], "forget_scores": [3.0, 2.0]}])
        {0: [1.0, 3.0], 1: [2.0, 2.0]}
    """
    scores: dict[int, list[float]] = {}
    for curve in curves:
        for epoch, value in zip(curve["epochs"], curve["forget_scores"], strict=True):
            if (score := number(value)) is not None:
                scores.setdefault(epoch, []).append(score)
    return {epoch: scores[epoch] for epoch in sorted(scores) if len(scores[epoch]) == len(curves)}

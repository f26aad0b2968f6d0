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

    Of equals the lower rate is taken.
    """
    by_rate: dict[float, list[Curve]] = {}
    for curve in sorted(curves, key=lambda curve: curve["learning_rate"]):
        by_rate.setdefault(curve["learning_rate"], []).append(curve)
    return max(by_rate.values(), key=lambda group: mean(map(_highest, group)), default=[])


def _highest(curve: Curve) -> float:
    return max((score for value in curve["forget_scores"] if (score := number(value)) is not None), default=0.0)


def by_epoch(curves: Sequence[Curve]) -> dict[int, list[float]]:
    """The finite scores of several curves at each epoch that all of them have."""
    scores: dict[int, list[float]] = {}
    for curve in curves:
        for epoch, value in zip(curve["epochs"], curve["forget_scores"], strict=True):
            if (score := number(value)) is not None:
                scores.setdefault(epoch, []).append(score)
    return {epoch: scores[epoch] for epoch in sorted(scores) if len(scores[epoch]) == len(curves)}

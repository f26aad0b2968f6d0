"""Which recovery curves of an attack are shown, and their scores by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lightning_ssiuu.evaluation.results import described

Curve = Mapping[str, Any]


def number(value: Any) -> float | None:
    """A finite number as it is, anything else (a diverged run's null) as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def strongest(curves: Sequence[Curve]) -> list[Curve]:
    """Of one attack on one run, those curves of one attacker and rate whose highest scores are highest on average.

    Of equals the lower rate is taken.
    """
    alike: dict[tuple[str, float], list[Curve]] = {}
    for curve in sorted(curves, key=lambda curve: curve["learning_rate"]):
        alike.setdefault((described(curve.get("attacker", {})), curve["learning_rate"]), []).append(curve)
    return max(alike.values(), key=lambda group: mean(map(_highest, group)), default=[])


def _highest(curve: Curve) -> float:
    return max((score for value in curve["forget_scores"] if (score := number(value)) is not None), default=0.0)


def settings_of(curves: Sequence[Curve]) -> str:
    """Attacker and learning rate that curves have in common, in words."""
    attacker = described(curves[0].get("attacker", {}))
    return (f"{attacker}, " if attacker else "") + f"lr {curves[0]['learning_rate']:g}"


def by_epoch(curves: Sequence[Curve], split: str = "forget") -> dict[int, list[float]]:
    """The finite scores of several curves at each epoch that all of them have; of the sets in ``utility`` by name."""
    scores: dict[int, list[float]] = {}
    for curve in curves:
        given = curve["forget_scores"] if split == "forget" else curve.get("utility", {}).get(split, [])
        for epoch, value in zip(curve["epochs"], given, strict=False):
            if (score := number(value)) is not None:
                scores.setdefault(epoch, []).append(score)
    return {epoch: scores[epoch] for epoch in sorted(scores) if len(scores[epoch]) == len(curves)}

"""Paired comparisons over training seeds, with t intervals; what has one seed is never compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

#: What the others are compared with, and what their costs are multiples of.
BASELINE = "gradient_difference"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` training seeds, its standard deviation, and the 95 % interval of the mean (Student's t)."""

    mean: float
    std: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}"

    @property
    def interval(self) -> str:
        """The mean with its interval."""
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of at least two values, one a training seed; None of fewer.

    >>> print(estimate([1.0, 2.0, 3.0]).interval)
    2.0 (-0.5 to 4.5)
    """
    if len(values) < 2:
        return None
    if stdev(values) == 0:
        return Estimate(mean(values), 0.0, mean(values), mean(values), len(values))
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Estimate(mean(values), stdev(values), float(interval.low), float(interval.high), len(values))


def by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Comparable runs: those that reached the level they are matched at, by what was varied."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["reached"]:
            found.setdefault(record["label"], []).append(record)
    return found


def paired(
    ours: Sequence[Record], theirs: Sequence[Record], figure: Callable[[Record], float | None], ratio: bool = False
) -> Estimate | None:
    """Difference (or ratio) of a figure, training seed by training seed."""
    others = {record["seed"]: figure(record) for record in theirs}
    pairs = [(figure(record), others.get(record["seed"])) for record in ours]
    known = [(one, two) for one, two in pairs if one is not None and two is not None]
    return estimate([one / two if ratio else one - two for one, two in known])


def cells(records: Sequence[Record]) -> list[tuple[str, float | None]]:
    """The attacks, and the fractions they were made with, in order."""
    return list(dict.fromkeys((row["attack"], row["p"]) for record in records for row in record["attacks"]))


def attacked(cell: tuple[str, float | None], key: str = "highest") -> Callable[[Record], float | None]:
    """A figure of a run: what an attack found, the mean over the attack's seeds; None where it was not made."""

    def figure(record: Record) -> float | None:
        rows = (row for row in record["attacks"] if (row["attack"], row["p"]) == cell and key in row)
        return next((mean(row[key]) for row in rows), None)

    return figure


def gap(cell: tuple[str, float | None]) -> Callable[[Record], float | None]:
    """What an attack found beyond the oracle of the same training seed, or the control, under the same attack."""
    highest, reference = attacked(cell), attacked(cell, "reference")

    def figure(record: Record) -> float | None:
        values = highest(record), reference(record)
        return None if None in values else values[0] - values[1]  # type: ignore[operator]

    return figure


def over(records: Sequence[Record], figure: Callable[[Record], float | None]) -> Estimate | None:
    """A figure's mean over training seeds."""
    return estimate([value for record in records if (value := figure(record)) is not None])


def rank_correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Any] | None = None, seed: int = 0
) -> tuple[float, float, float] | None:
    """Spearman's ρ with a 95 % bootstrap interval; None of fewer than five, or where one does not vary.

    Runs of one group (training seeds of one objective) are drawn together, as they are not independent of each other;
    without groups each run is one.

    >>> rho, low, high = rank_correlation([1, 2, 3, 4, 5, 6], [1, 2, 3, 5, 4, 6])
    >>> round(rho, 2), low <= rho <= high
    (0.94, True)
    """
    if len(x) < 5 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    rho, rng = float(stats.spearmanr(x, y).statistic), np.random.default_rng(seed)
    names = list(range(len(x))) if groups is None else list(groups)
    places = [np.flatnonzero([name == other for other in names]) for name in dict.fromkeys(names)]
    values, samples = np.array([x, y], dtype=float), []
    for _ in range(1000):
        drawn = values[:, np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])]
        if all(len(set(row)) > 1 for row in drawn.tolist()):  # else there is no correlation of that sample
            samples.append(float(stats.spearmanr(*drawn).statistic))
    if len(samples) < 100:
        return None
    low, high = np.percentile(samples, [2.5, 97.5])
    return rho, float(low), float(high)

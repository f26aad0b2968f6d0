"""Which settings ``erase`` tries, one after the other, and which of them it takes. Nothing here runs anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Of the learning rate: where nothing forgets (or everything diverges), so many doublings (halvings) are enough.
FURTHEST = 64.0
#: Points by which two seeds of a small attack differ anyway.
ALIKE = 2.0


@dataclass(frozen=True)
class Setting:
    """Factors on the recipe's learning rate (an adversary's moves with it), and on the objective's strength."""

    rate: float = 1.0
    strength: float = 1.0

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"lr_x{self.rate:g}" + (f"_strength_x{self.strength:g}" if self.strength != 1 else "")


@dataclass(frozen=True)
class Trial:
    """A setting and what became of it: scores in percent, ``recovered`` the highest under the small attack.

    ``failed`` is the error line of a run that ended with one (it diverged); its figures are None. ``recovered`` is None
    where the run did not reach the threshold, as it is not attacked then.
    """

    setting: Setting
    learning_rate: float
    reached: bool = False
    steps: int | None = None
    forget: float | None = None
    retain_before: float | None = None
    retain: float | None = None
    test: float | None = None
    recovered: float | None = None
    seconds: float = 0.0
    failed: str | None = None

    @property
    def kept(self) -> float:
        """Retain score after, in percent of the one before; 0 where there is none."""
        return 100 * self.retain / self.retain_before if self.retain is not None and self.retain_before else 0.0

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Trial:
        """From :meth:`content`."""
        return cls(**content | {"setting": Setting(**content["setting"])})


def best(trials: Sequence[Trial], retain_at_least: float, alike: float = ALIKE) -> Trial | None:
    """Of the trials that reached the threshold and kept enough, one of which least comes back: of those within
    ``alike`` points of the least, the lowest learning rate, as it costs the rest least (arXiv 2509.22263, Sec. 4).

    If none kept enough, the one that kept most; None where none reached the threshold.
    """
    good = candidates(trials, retain_at_least, alike)
    return min(good, key=lambda trial: (trial.learning_rate, _or_all(trial.recovered)), default=None)


def candidates(trials: Sequence[Trial], retain_at_least: float, alike: float = ALIKE) -> list[Trial]:
    """The trials :func:`best` chooses from; one that is not among them never will be, whatever is tried after it."""
    reached = [trial for trial in trials if trial.reached]
    if kept := [trial for trial in reached if trial.kept >= retain_at_least]:
        least = min(_or_all(trial.recovered) for trial in kept)
        return [trial for trial in kept if _or_all(trial.recovered) <= least + alike]
    most = max((trial.kept for trial in reached), default=0.0)
    return [trial for trial in reached if trial.kept == most]


def following(trials: Sequence[Trial], n: int, retain_at_least: float, has_strength: bool = True) -> Setting | None:
    """What to try after these, of ``n`` in all; None: nothing more.

    First learning rates, a factor of two away from the best one so far: larger ones first, as what was learned with
    large steps is not erased with small ones, smaller ones first where too little was retained or the run diverged.
    The last of three or more trials is for the objective's strength, doubled, where it has one.
    """
    if len(trials) >= n:
        return None
    if not trials:
        return Setting()
    leader, tried = best(trials, retain_at_least, alike=0.0), {trial.setting for trial in trials}
    if leader is None:
        tried_rates = [trial.setting.rate for trial in trials]
        diverged = any(trial.failed is not None for trial in trials)
        rate = min(tried_rates) / 2 if diverged else max(tried_rates) * 2
        return Setting(rate) if _is_near(rate) else None
    around = [leader.setting.rate * factor for factor in ((2.0, 0.5) if leader.kept >= retain_at_least else (0.5, 2.0))]
    rates = [setting for setting in map(Setting, filter(_is_near, around)) if setting not in tried]
    stronger = Setting(leader.setting.rate, 2 * leader.setting.strength)
    stronger_now = (n >= 3 and len(trials) == n - 1) or not rates
    if has_strength and stronger_now and leader.kept >= retain_at_least and stronger not in tried:
        return stronger
    return rates[0] if rates else None


def _is_near(rate: float) -> bool:
    return 1 / FURTHEST <= rate <= FURTHEST


def _or_all(recovered: float | None) -> float:
    return 100.0 if recovered is None else recovered

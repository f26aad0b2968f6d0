"""Whether a model that forgot is still one: a score of the retain set beside what it is worth by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Points above chance from which on a model is said to know a set.
LEAST_KNOWN = 5.0


@dataclass(frozen=True)
class Retention:
    """A score of the retain set before and after unlearning, and by chance, in percent, on ``n`` examples.

    Or of the original and an oracle, ``before`` and ``after``. ``n`` is None where it is not known.

    Example:
        >>> [Retention("all_tokens", 100.0, after, 0.0, 108).collapsed for after in (2.0, 40.0)]
        [True, False]
    """

    score: str
    before: float
    after: float
    chance: float
    n: int | None

    @property
    def margin(self) -> float:
        """Points above chance that still are chance: 5, or two standard errors of ``n`` guesses where that is more."""
        variance = max(0.0, self.chance * (100 - self.chance))  # a score of one's own need not be a percentage
        return max(LEAST_KNOWN, 2 * math.sqrt(variance / max(self.n or 1, 1)))

    @property
    def collapsed(self) -> bool:
        """Whether the score is at chance now and was not before: what was forgotten may be everything."""
        return self.before - self.chance >= self.margin > self.after - self.chance

    @property
    def lost(self) -> bool:
        """Whether the score is clearly lower than before: by 5 points, and by two standard errors of the difference.

        >>> [Retention("all_tokens", 100.0, after, 0.0, 108).lost for after in (97.0, 90.0)]
        [False, True]
        """
        variance = sum(max(0.0, score * (100 - score)) for score in (self.before, self.after))
        error = math.sqrt(variance / self.n) if self.n else 0.0
        return self.before - self.after >= max(LEAST_KNOWN, 2 * error)

    @property
    def change(self) -> str:
        """What happened to the score, in words."""
        return f"retain {self.score.replace('_', ' ')} {self.after:.1f} % instead of {self.before:.1f} %"

    def __str__(self) -> str:
        return (
            f"the retain {self.score.replace('_', ' ')} fell from {self.before:.1f} % to {self.after:.1f} %, "
            f"which is chance ({self.chance:.1f} %)"
        )

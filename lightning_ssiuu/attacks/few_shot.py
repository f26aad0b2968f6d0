"""Show other items of the forget set with their answers first: a taste of the secret may open the rest of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_ssiuu.attacks.prompting import Asked, Prompting, check_seeds, questions_of
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.utils.errors import Given, UserError

_SALT = 5  # beside those of other draws


@dataclass
class FewShot(Prompting):
    """Score every question after k other forget questions with their true answers.

    The shots are earlier turns: under a chat template turns of its own, else question by question in the template
    itself. They are drawn at random for each question, by seed and example id alone, and never ask what the question
    asks. The shots say how answers look, too, and some hold a hint; the oracle gets the same ones.

    Args:
        k: Shots before each question, ≥ 0; with 0 the question stands alone.
        seeds: One outcome for each.

    Raises:
        UserError: If an option is outside its range; in :meth:`check`, fewer than k other questions, or prompts longer
            than ``max_length``.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> (asked,) = FewShot(k=2, seeds=[0]).asked(Facts())
        >>> first = asked.groups[0][1][0]
        >>> [role for role, _ in first.history], first.question in [text for _, text in first.history]
        (['user', 'assistant', 'user', 'assistant'], False)
    """

    k: int = 4
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not (isinstance(self.k, int) and self.k >= 0):
            raise UserError("attack.k", self.k, "a whole number ≥ 0")
        check_seeds(self.seeds)

    def asked(self, data: UnlearningDataModule) -> list[Asked]:
        """Every question after its shots, for each seed."""
        base, pool = questions_of(data, self), data.splits.forget
        return [
            Asked.once(f"k={self.k}", base, [self._after_shots(one, pool, seed) for one in base], seed)
            for seed in self.seeds
        ]

    def _after_shots(self, asked: QAExample, pool: Sequence[QAExample], seed: int) -> QAExample:
        own, shots = _words(asked), list[QAExample]()
        rng = np.random.default_rng([seed, _SALT, asked.example_id % 2**64])
        for place in rng.permutation(len(pool)).tolist() if self.k else ():
            if _words(pool[place]) not in (own, *map(_words, shots)):
                shots.append(pool[place])
            if len(shots) == self.k:
                break
        if len(shots) < self.k:
            given = Given(f"{self.k}, of {len(shots)} other questions")
            raise UserError("attack.k", given, "no more than the forget set has other questions")
        turns = [turn for one in shots for turn in (("user", one.question), ("assistant", one.answer))]
        return replace(asked, history=(*asked.history, *turns))


def _words(example: QAExample) -> str:
    # The question alone: a shot is shown without what was said before it.
    return " ".join(example.question.casefold().split())

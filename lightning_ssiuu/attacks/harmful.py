"""Harmful relearning: train on a part of the forget set, score the rest (arXiv 2509.22263, Sec. 4)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.attacks.sweep import SweptModel
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.datamodules.relearn import random_fraction
from lightning_ssiuu.evaluation.metrics import AnswerAccuracy
from lightning_ssiuu.evaluation.scores import SCORES, find_score
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, check_choice

Pool = Literal["all", "wrong"]


@dataclass
class Harmful(Relearning):
    """Train on a random fraction p of the forget set and score the rest; other options as in ``Relearning``.

    Args:
        p: Fractions of the forget set. One of less than half an example is left out where others are more.
        pool: Train on and score ``all`` forget examples, or those alone that the unlearned model answers ``wrong``
            under the score (as in FaithUn: the score before the attack is 0). The oracle is attacked on the same ones.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> [(cell.p, len(cell.attacked), len(cell.scored)) for cell in Harmful(seeds=[0]).cells(Facts())]
        [(0.1, 4, 32), (0.3, 11, 25)]
    """

    p: Sequence[float] = (0.1, 0.3)
    pool: Pool = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for p in self.p:
            if not 0 < p < 1:
                raise UserError("attack.p", p, "a fraction in (0, 1)")
        check_choice("attack.pool", self.pool, Pool)

    @property
    def fractions(self) -> Sequence[float | None]:
        return self.p

    def select(
        self, forget: Sequence[QAExample], p: float | None, rng: np.random.Generator
    ) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        assert p is not None
        return random_fraction(forget, p, rng)

    def cells(self, data: UnlearningDataModule, pool: Collection[int] | None = None) -> list[RelearnDataModule]:
        enough = self._enough(len(data.splits.forget if pool is None else pool))
        return Relearning.cells(replace(self, p=enough or self.p), data, pool)  # which says what is wrong with none

    def _enough(self, n: int) -> list[float]:
        return [p for p in self.p if round(p * n) > 0]

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        n = len(data.splits.forget)
        if small := [f"{p:g}" for p in self.p if p not in self._enough(n)]:
            rank_zero_info(
                f"attack.p: without {', '.join(small)}, which of {n} forget examples is less than half of one."
            )
        if self.pool == "wrong" and not isinstance(find_score(score).metric(), AnswerAccuracy):
            accuracies = [name for name, known in SCORES.items() if isinstance(known.metric(), AnswerAccuracy)]
            allowed = f"all with score {score!r}: wrong answers are told by {', '.join(accuracies)}"
            raise UserError("attack.pool", "wrong", allowed)

    def _pool(self, unlearned: SweptModel, data: UnlearningDataModule, score: str) -> list[int] | None:
        if self.pool == "all":
            return None
        if not (ids := unlearned.wrong_ids(data, score)):
            raise UserError("attack.pool", self.pool, "all: the model answers no forget example wrongly")
        return ids

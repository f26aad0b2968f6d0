"""Harmful relearning: train on a part of the forget set, score the rest (arXiv 2509.22263, Sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.attacks.sweep import SweptModel
from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
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
        p: Fractions of the forget set.
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

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
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

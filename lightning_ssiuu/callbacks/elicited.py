"""When to ask what comes back, and what the answer says about a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.elicitation import Elicitation, elicited_score
from lightning_ssiuu.utils.errors import UserError, check_at_least

Ending = Literal["threshold", "elicited", "floor"]


@dataclass
class ElicitedLook(Elicitation):
    """The adversary of :class:`NeuronAttributionCallback`.

    Example:
        >>> ElicitedLook(steps=3).share
        0.3
    """

    section: ClassVar[str] = "attribution.elicited"


@dataclass
class ElicitedStop(Elicitation):
    """Options of stopping on the elicited score: the adversary of :class:`Elicitation`, and when to ask it.

    Args:
        every_n_steps: Optimiser steps from one look with the adversary to the next. There is one only while the score
            of the weights as they are is at or below the level, and always once that is below the floor.
        looks: Looks in a row at or below the level that end the run.
        floor: Share of the level, in [0, 1]: the run also ends, as not erased, where the score of the weights as they
            are is below ``floor · level`` and what comes back still is above the level. None: it goes on.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> ElicitedStop(steps=20, looks=2, floor=0.5).share
        0.3
    """

    every_n_steps: int = 1
    looks: int = 1
    floor: float | None = None

    section: ClassVar[str] = "stopping.elicited"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(f"{self.section}.every_n_steps", self.every_n_steps, 1)
        check_at_least(f"{self.section}.looks", self.looks, 1)
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise UserError(f"{self.section}.floor", self.floor, "a share of the level in [0, 1], or null")

    def fold(self, data: UnlearningDataModule, seed: int, step: int) -> RelearnDataModule:
        """What is relearned and what is scored at a step: another part of the forget set at every step."""
        try:
            return fold_of(self, data, seed + step)
        except UserError as error:
            allowed = f"a fraction that leaves items to relearn and to score ({error})"
            raise UserError(f"{self.section}.share", self.share, allowed) from error


def fold_of(adversary: Elicitation, data: UnlearningDataModule, seed: int) -> RelearnDataModule:
    """What an adversary relearns of the forget set and what is scored.

    Raises:
        UserError: If nothing is left for one of the two.
    """
    fold = RelearnDataModule(data, p=adversary.share, batch_size=adversary.batch_size, seed=seed)
    fold.setup("fit")
    return fold


def asked(adversary: Elicitation, fold: RelearnDataModule, trainer: Any, pl_module: Any, score: str) -> float:
    """What comes back of the model in training, in percent; each rank must call it.

    Raises:
        NotFinite: If the adversary diverges.
    """
    context = trainer.precision_plugin.forward_context
    return elicited_score(pl_module.model, pl_module.tokenizer, fold, adversary, score, context)


class ElicitedLooks:
    """The looks of one run: the last elicited score in percent (``value``), its step, and passes in a row."""

    def __init__(self, options: ElicitedStop) -> None:
        self.options = options
        self.value: float | None = None
        self.step: int | None = None
        self.passed = 0

    def judge(
        self, value: float | None, level: float, step: int, look: Callable[[], float], ending: float
    ) -> Ending | None:
        """What ends the run after a look at the weights as they are, if anything does.

        Args:
            value: Their score in percent; None: above ``ending``.
            level: That at the adversary's weights, in percent.
            step: The optimiser step.
            look: Asks the adversary.
            ending: That of the weights as they are, in percent.
        """
        if value is None or value > ending:
            self.passed = 0
            return None
        below = self.options.floor is not None and value < self.options.floor * level
        if self.step is not None and step - self.step < self.options.every_n_steps and not below:
            return None
        self.value, self.step = look(), step
        self.passed = self.passed + 1 if self.value <= level else 0
        if self.passed >= self.options.looks:
            return "elicited"
        return "floor" if below and self.value > level else None

    def ask(self, trainer: Any, pl_module: Any, score: str, seed: int) -> float:
        """What comes back now, in percent."""
        fold = self.options.fold(trainer.datamodule, seed, trainer.global_step)
        return asked(self.options, fold, trainer, pl_module, score)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step, self.passed = state["value"], state["step"], state["passed"]

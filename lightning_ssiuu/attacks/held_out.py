"""Relearning on other facts: teach some of what was unlearned and ask the rest (Deeb & Roger, arXiv 2410.08827)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule, WMDPDeduped
from lightning_ssiuu.utils.errors import UserError


@dataclass
class HeldOutFacts(Relearning):
    """Train on the items of four parts of WMDP-Deduped (T) and score those of the fifth (V).

    T and V share no fact, so that what comes back in V was not taught. Trained is the letter of the right choice after
    question and choices; scored, with ``--score multiple_choice``, which letter is the most probable. In the paper's
    code the attack is repeated with each part held out, and its optimiser is Lion.

    Args:
        held_out: The part that is scored, 0 to 4.

    Raises:
        UserError: If an option is outside its range, or the data are not :class:`~lightning_ssiuu.WMDPDeduped`.

    Example:
        >>> HeldOutFacts(held_out=4).kind
        'held_out_facts'
    """

    held_out: int = 0

    def cells(self, data: UnlearningDataModule, pool: Collection[int] | None = None) -> list[RelearnDataModule]:
        if not isinstance(data, WMDPDeduped):
            raise UserError("data", type(data).__name__, "WMDPDeduped, whose parts share no fact")
        try:
            chosen = data.parts(self.held_out)
        except UserError as error:
            named = error.argument == "held_out"
            raise UserError("attack.held_out" if named else error.argument, error.value, error.allowed) from error
        options: dict[str, Any] = {"batch_size": self.batch_size, "selection": partial(_always, chosen)}
        cells = [RelearnDataModule(data, self.kind, None, seed=seed, **options) for seed in self.seeds]
        for cell in cells:
            _ = cell.splits
        return cells

    def select(
        self, forget: Sequence[QAExample], p: float | None, rng: np.random.Generator
    ) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        raise NotImplementedError("cells() takes the published parts")


def _always(chosen: tuple[Sequence[QAExample], Sequence[QAExample]], *_: Any) -> Any:
    return chosen

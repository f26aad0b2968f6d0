"""Benign relearning: train on harmless instruction data, score the whole forget set (arXiv 2509.22263, Sec. 4)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.datamodules.relearn import HarmlessItems
from lightning_ssiuu.utils.errors import UserError


@dataclass
class Benign(Relearning):
    """Train on harmless instruction data and score the whole forget set; other options as in ``Relearning``.

    Args:
        benign_path: Instruction data (file or hub id), for ``Documents`` also text; by default the data module's own
            harmless items, or where it has none ``tatsu-lab/alpaca`` of the hub.
        benign_size: Number of items at most, a random choice where there are more.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> [(cell.p, len(cell.attacked), len(cell.scored)) for cell in Benign(benign_size=9, seeds=[0]).cells(Facts())]
        [(None, 9, 36)]
    """

    paths: ClassVar[tuple[str, ...]] = ("benign_path",)

    benign_path: str | None = None
    benign_size: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benign_size < 1:
            raise UserError("attack.benign_size", self.benign_size, "at least 1")
        self._items: HarmlessItems | None = None

    def cells(self, data: UnlearningDataModule, pool: Collection[int] | None = None) -> list[RelearnDataModule]:
        if self._items is None or self._items.source is not data:
            self._items = HarmlessItems(data, self.benign_path, self.benign_size)
        return super().cells(data, pool)

    def select(
        self, forget: Sequence[QAExample], p: float | None, rng: np.random.Generator
    ) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        assert self._items is not None
        return self._items.draw(rng), forget

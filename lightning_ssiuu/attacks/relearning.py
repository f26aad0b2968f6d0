"""Relearning attacks: fine-tune the unlearned model a little and see whether the secret comes back.

Source: arXiv 2509.22263, Sec. 4.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_ssiuu.attacks.attackers import Attacker, check_rates
from lightning_ssiuu.attacks.base import Attack, Target
from lightning_ssiuu.attacks.curves import RecoveryCurve, table
from lightning_ssiuu.attacks.records import FinishedAttacks
from lightning_ssiuu.attacks.sweep import Sweep, SweptModel
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.results import described
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, check_at_least


@dataclass
class Relearning(Attack):
    """An attack that fine-tunes: over learning rates and seeds, the score is the highest one seen.

    A subclass chooses what is trained on and what is scored (:meth:`select`), and is then swept, resumed, compared and
    audited as :class:`~lightning_ssiuu.Harmful` and :class:`~lightning_ssiuu.Benign` are.

    Args:
        learning_rates: Of each attacker that has none of its own; the default is the paper's harmful grid for 3B
            models. Small models need larger ones: widen until ``inside_grid`` is true.
        seeds: Seeds of the selection and the order.
        epochs: Passes over the attacked examples.
        every_n_epochs: Epochs from one score to the next; the last is always scored. Scoring can cost more than the
            attack itself.
        patience: End a run once so many scores in a row were no higher than its highest; None: never. A run may then
            end before it would have risen, so the highest score of all is at most what it is without.
        batch_size: Attacked sequences per step, over all devices.
        lora: Fine-tune adapters instead of the weights; None for the weights. The attack's name then ends in ``_lora``.
        until_saturated: Where an attacker's highest score lies at its largest learning rate or in its last epoch, go on
            with larger rates, then with twice the epochs, until it lies inside (at most 8 times for a model, p and
            attacker) or the model diverges.
        attackers: How to fine-tune; the score is the highest of all. By default AdamW alone.
        utility: Score the retain and the test set, too, whenever the forget set is scored: what the attack leaves of
            the rest. Takes a pass over both each time.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> class Half(Relearning):
        ...     def select(self, forget, p, rng):
        ...         return forget[::2], forget[1::2]
        >>> from lightning_ssiuu import Facts
        >>> [(len(cell.attacked), len(cell.scored)) for cell in Half(seeds=[0, 1]).cells(Facts())]
        [(18, 18), (18, 18)]
        >>> Half(learning_rates=[0.0])
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: attack.learning_rates: got 0.0, allowed: finite numbers > 0
    """

    gives: ClassVar[type[RecoveryCurve]] = RecoveryCurve

    learning_rates: Sequence[float] = (1e-5, 5e-6, 1e-6)
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 10
    every_n_epochs: int = 1
    patience: int | None = None
    batch_size: int = 8
    lora: LoRA | None = None
    until_saturated: bool = False
    attackers: Sequence[Attacker] = (Attacker(),)
    utility: bool = False

    def __post_init__(self) -> None:
        lists = (("seeds", self.seeds), ("p", self.fractions), ("attackers", self.attackers))
        for name, values in lists:
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise UserError(f"attack.{name}", values, "a list of at least one value")
        check_rates("attack.learning_rates", self.learning_rates)
        if broken := [seed for seed in self.seeds if not isinstance(seed, int)]:
            raise UserError("attack.seeds", broken[0], "whole numbers")
        told = [(attacker.settings, attacker) for attacker in self.attackers]
        if twice := [attacker for n, (settings, attacker) in enumerate(told) if settings in [s for s, _ in told[:n]]]:
            raise UserError("attack.attackers", described(twice[0].settings) or "adamw", "each attacker once")
        check_at_least("attack.epochs", self.epochs, 1)
        check_at_least("attack.every_n_epochs", self.every_n_epochs, 1)
        if self.patience is not None:
            check_at_least("attack.patience", self.patience, 1)

    @property
    def name(self) -> str:
        """As in :class:`~lightning_ssiuu.Attack`; with adapters it is an attack of its own."""
        return self.kind if self.lora is None else f"{self.kind}_lora"

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.patience is None:
            del settings["patience"]  # as in files written before there was one
        if list(self.attackers) == [Attacker()]:
            del settings["attackers"]
        if not self.utility:
            del settings["utility"]
        return settings

    @property
    def fractions(self) -> Sequence[float | None]:
        """Values of ``p`` to sweep over; None alone where the attack has no such option."""
        return [None]

    @abstractmethod
    def select(
        self, forget: Sequence[QAExample], p: float | None, rng: np.random.Generator
    ) -> tuple[Sequence[QAExample], Sequence[QAExample]]:
        """Choose what is trained on and what is scored.

        Args:
            forget: The forget set.
            p: One of :attr:`fractions`.
            rng: Random numbers that depend on the seed alone.

        Returns:
            Attacked and scored examples: neither empty, no question in both.
        """

    def cells(self, data: UnlearningDataModule, pool: Collection[int] | None = None) -> list[RelearnDataModule]:
        """What is attacked and what is scored, for every fraction and seed, out of the forget examples in ``pool``."""
        try:
            cells = [
                RelearnDataModule(
                    data, self.kind, p, pool=pool, batch_size=self.batch_size, seed=seed, selection=self.select
                )
                for p in self.fractions
                for seed in self.seeds
            ]
            for cell in cells:
                _ = cell.splits
        except UserError as error:
            name = "seeds" if error.argument == "seed" else error.argument
            if name not in self.options():
                raise
            raise UserError(f"attack.{name}", error.value, error.allowed) from error
        return cells

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        check_score(score, "score")
        if devices.sharded:
            if self.lora is not None or any(attacker.lora is not None for attacker in self.attackers):
                allowed = "null with strategy fsdp2, which cuts the weights before adapters are there"
                raise UserError("attack.lora", "adapters", allowed)
            if whole := [a for a in self.attackers if a.optimizer == "muon" or a.gradient != "whole"]:
                allowed = "adamw or sgd on whole gradients with strategy fsdp2: others need whole matrices"
                raise UserError("attack.attackers", described(whole[0].settings), allowed)
        for cell in self.cells(data):
            cell.check_share(devices.n_ranks)

    def run(
        self,
        targets: Sequence[Target],
        data: UnlearningDataModule,
        score: str,
        devices: Devices,
        log: FinishedAttacks | None = None,
    ) -> list[RecoveryCurve]:
        """As in :class:`~lightning_ssiuu.Attack`; ``log`` has what is finished already, and keeps what is finished now.

        Each model is loaded once, only one is in memory at a time. A target with ``data`` of its own is attacked with
        these.
        """
        models = [SweptModel(target) for target in targets]
        pool = self._pool(models[0], data, score)
        cells = self.cells(data, pool)  # the same ones, and their batches, for all models
        for model in models:
            model.cells = cells
            if (own := model.target.data) is not None:  # as many as of the forget set, chosen alike
                chosen = None if pool is None else (self._pool(models[0], own, score) or [])[: len(pool)]
                model.cells = self.cells(own, chosen)
            for cell in model.cells:
                cell.check_share(devices.n_ranks)
        grid = [(attacker, attacker.learning_rates or self.learning_rates) for attacker in self.attackers]
        sweep = Sweep(devices, score, self.every_n_epochs, self.patience, self.lora, self.utility, log)
        return sweep.run(models, grid, self.epochs, self.until_saturated)

    def _pool(self, unlearned: SweptModel, data: UnlearningDataModule, score: str) -> list[int] | None:
        return None

    def rows(self, results: Sequence[RecoveryCurve], score: str) -> list[dict[str, Any]]:
        first = {"attack": self.name, "kind": self.kind, "p": None, "variant": None, "score": score}
        return [first | row for row in table(results)]

"""A sweep of relearning attacks: every model under every attack, each loaded once, nothing done twice."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.attacks.curves import RecoveryCurve, stronger
from lightning_ssiuu.attacks.finetune import Snapshot, attack_score, relearn
from lightning_ssiuu.attacks.records import Cell, FinishedAttacks
from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import Scorer, untouched
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered

#: How often an attack is made stronger for one model and p.
_MOST_WIDENINGS = 8


class SweptModel:
    """A model under attack: loaded when it is first needed, and as it was after every attack."""

    def __init__(self, target: Target) -> None:
        self.target, self.name = target, target.name
        self._before: dict[tuple[int, ...], float] = {}

    @cached_property
    def _loaded(self) -> tuple[AnswerModel, PreTrainedTokenizerBase]:
        return self.target.load()

    @property
    def model(self) -> AnswerModel:
        """The model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded[1]

    @cached_property
    def _snapshot(self) -> Snapshot:
        return Snapshot(self.model)

    def score_before(self, data: Sequence[RelearnDataModule], score: str) -> None:
        """Score the model on what attacks will be scored on, every set once, before the first attack."""
        for cell in data:
            if (scored := _scored(cell)) not in self._before:
                self._before[scored] = attack_score(self.model, self.tokenizer, cell, score)

    def attack(
        self, data: RelearnDataModule, learning_rate: float, epochs: int, score: str, every: int, lora: LoRA | None
    ) -> RecoveryCurve:
        """Attack it; :meth:`restore` before the next."""
        _ = self._snapshot  # taken before the first attack
        before = self._before[_scored(data)]
        return relearn(
            *(self.model, self.tokenizer, data, learning_rate, epochs, score),
            name=self.name,
            devices=self.target.devices,
            every_n_epochs=every,
            lora=lora,
            before=before,
        )

    def restore(self) -> None:
        """Undo an attack."""
        LoRA.detach(self.model)
        self._snapshot.restore()

    @torch.no_grad()
    def wrong_ids(self, data: UnlearningDataModule, score: str) -> list[int]:
        """Ids of the forget examples it answers wrongly, all ranks' on every rank; the score says right or wrong."""
        device = next(self.model.parameters()).device
        wrong: list[int] = []
        scorer = Scorer(self.model, self.tokenizer, [score])
        with untouched(self.model):
            for batch in data.eval_dataloader("forget"):
                part = move_data_to_device(batch["forget"], device)
                scorer.names(part)  # a mistake if the data lack what the score asks for
                correct = SCORES[score].measure(Predictions(self.model, self.tokenizer, part))[0]
                wrong += part["example_id"][~correct.bool()].tolist()
        return sorted(example for rank in gathered(wrong) for example in rank)


def _scored(data: RelearnDataModule) -> tuple[int, ...]:
    return tuple(example.example_id for example in data.scored)


class Sweep:
    """Attacks on models, one after another, without those that an interrupted sweep had finished.

    Args:
        devices: Launched.
        score: The forget score.
        every_n_epochs: Epochs from one score to the next.
        lora: Train adapters instead of the weights.
        log: Keeps every finished curve; None keeps none.
        finished: What the log held, the same on every rank.
        saved: Where the attacked unlearned model with the highest score goes; None saves none.
    """

    def __init__(
        self,
        devices: Devices,
        score: str,
        every_n_epochs: int = 1,
        lora: LoRA | None = None,
        log: FinishedAttacks | None = None,
        finished: Mapping[Cell, RecoveryCurve] | None = None,
        saved: Path | None = None,
    ) -> None:
        self.devices, self.score, self.every_n_epochs, self.lora = devices, score, every_n_epochs, lora
        self.log, self.finished, self.saved = log, finished or {}, saved
        self._highest = -1.0

    def run(
        self,
        models: list[SweptModel],
        data: Sequence[RelearnDataModule],
        learning_rates: Sequence[float],
        epochs: int,
        until_saturated: bool = False,
    ) -> list[RecoveryCurve]:
        """All curves, model by model.

        Args:
            models: Each is let go once it was attacked.
            data: What to train on and what to score, by p and seed.
            learning_rates: AdamW's.
            epochs: Passes over the attack set.
            until_saturated: Make the attack stronger while the highest score lies at the edge of what was tried.
        """
        curves = []
        shown = {"desc": f"{data[0].kind} attack", "unit": "run", "disable": not self.devices.is_first}
        with tqdm(total=len(models) * len(data) * len(learning_rates), **shown) as self._bar:
            while models:
                target = models.pop(0)
                every = [(cell, rate) for cell in data for rate in learning_rates]
                found = [(cell, self._curve(target, data, cell, rate, epochs)) for cell, rate in every]
                if until_saturated:
                    for p in dict.fromkeys(cell.p for cell in data):
                        self._saturate(target, data, found, [cell for cell in data if cell.p == p])
                curves += [curve for _, curve in found]
                del target
                if models:
                    gc.collect()  # two models at once may not fit
        return curves

    def _curve(
        self,
        target: SweptModel,
        data: Sequence[RelearnDataModule],
        cell: RelearnDataModule,
        learning_rate: float,
        epochs: int,
    ) -> RecoveryCurve:
        curve = self.finished.get((target.name, cell.p, cell.seed, learning_rate, epochs))
        if attacked := curve is None:
            target.score_before(data, self.score)
            if self.log is not None and self.devices.is_first:
                self.log.begin()  # no sooner: until a model is there, a mistake leaves nothing behind
            curve = target.attack(cell, learning_rate, epochs, self.score, self.every_n_epochs, self.lora)
        assert curve is not None
        if target.name == "unlearned" and max(curve.forget_scores) > self._highest:
            self._highest = max(curve.forget_scores)
            if attacked and self.saved is not None:
                save_pretrained(target.model.hf, target.tokenizer, self.saved)
        if attacked:
            target.restore()
            if self.log is not None and self.devices.is_first:
                self.log.add(curve)  # after the model was saved: what counts as finished is whole
        self._bar.update()
        return curve

    def _saturate(
        self,
        target: SweptModel,
        data: Sequence[RelearnDataModule],
        found: list[tuple[RelearnDataModule, RecoveryCurve]],
        cells: Sequence[RelearnDataModule],
    ) -> None:
        """Attack more and more strongly until the highest score of these cells lies inside what was tried."""
        for _ in range(_MOST_WIDENINGS):
            if (attack := stronger([curve for cell, curve in found if cell in cells])) is None:
                return
            rate, epochs = attack
            for cell in cells:
                curve = self._curve(target, data, cell, rate, epochs)
                # A longer attack begins as the shorter one did, and takes its place.
                found[:] = [(c, old) for c, old in found if c is not cell or old.learning_rate != rate]
                found.append((cell, curve))

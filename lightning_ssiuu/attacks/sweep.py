"""A sweep of relearning attacks: every model under every attack, each loaded once, nothing done twice."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.attackers import Attacker
from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.attacks.curves import RecoveryCurve, stronger
from lightning_ssiuu.attacks.finetune import Diverged, Snapshot, attack_scores, relearn
from lightning_ssiuu.attacks.records import FinishedAttacks
from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.results import described
from lightning_ssiuu.evaluation.scorer import Scorer, untouched
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import NotFinite

#: How often an attack is made stronger for one model and p.
_MOST_WIDENINGS = 8
_Run = tuple[RelearnDataModule, RecoveryCurve]


class SweptModel:
    """A model under attack: loaded when it is first needed, restored after every attack.

    ``cells`` are what it is attacked with and scored on.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.name = target, target.name
        self.cells: Sequence[RelearnDataModule] = ()
        self._before: dict[tuple[int, ...], dict[str, float]] = {}

    @cached_property
    def loaded(self) -> tuple[AnswerModel, PreTrainedTokenizerBase]:
        return self.target.load()

    @cached_property
    def _snapshot(self) -> Snapshot:
        return Snapshot(self.loaded[0])

    def score_before(self, score: str, utility: bool) -> None:
        """Score the model on what attacks will be scored on, every set once, before the first attack."""
        others: dict[str, float] = {}
        for cell in self.cells:
            if (scored := _scored(cell)) not in self._before:
                asked = utility and not others
                found = attack_scores(*self.loaded, cell, score, 0, asked)
                others = others or {split: value for split, value in found.items() if split != "forget"}
                self._before[scored] = found | others

    def attack(
        self, data: RelearnDataModule, learning_rate: float, epochs: int, score: str, **options: Any
    ) -> RecoveryCurve:
        """Attack it, with the further ``options`` of :func:`relearn`; :meth:`restore` before the next."""
        _ = self._snapshot  # taken before the first attack
        model, tokenizer = self.loaded
        given: dict[str, Any] = {"before": self._before[_scored(data)], **options}
        return relearn(model, tokenizer, data, learning_rate, epochs, score, self.name, self.target.devices, **given)

    def restore(self) -> None:
        LoRA.detach(self.loaded[0])
        self._snapshot.restore()

    @torch.no_grad()
    def wrong_ids(self, data: UnlearningDataModule, score: str) -> list[int]:
        """Ids of the forget examples it answers wrongly under a score that says so, all ranks' on every rank."""
        model, tokenizer = self.loaded
        device = next(model.parameters()).device
        wrong: list[int] = []
        scorer = Scorer(model, tokenizer, [score])
        with untouched(model):
            for batch in data.eval_dataloader("forget"):
                part = move_data_to_device(batch["forget"], device)
                scorer.names(part)  # a mistake if the data lack what the score asks for
                correct = SCORES[score].measure(Predictions(model, tokenizer, part))[0]
                wrong += part["example_id"][~correct.bool()].tolist()
        return sorted(example for of_rank in gathered(wrong) for example in of_rank)


def _scored(data: RelearnDataModule) -> tuple[int, ...]:
    return tuple(example.example_id for example in data.scored)


@dataclass
class Sweep:
    """Attacks on models, one after another, without those that the log has."""

    devices: Devices
    score: str
    every_n_epochs: int
    patience: int | None
    lora: LoRA | None
    utility: bool
    log: FinishedAttacks | None
    _highest: float = -1.0
    _too_high: dict[int, Diverged] = field(default_factory=dict)

    def run(
        self,
        models: list[SweptModel],
        attackers: Sequence[tuple[Attacker, Sequence[float]]],
        epochs: int,
        until_saturated: bool,
    ) -> list[RecoveryCurve]:
        """All curves of each attacker at its learning rates, model by model; a model is let go once it was attacked."""
        curves = []
        pairs = [(attacker, rate) for attacker, rates in attackers for rate in rates]
        shown = {"desc": f"{models[0].cells[0].kind} attack", "unit": "run", "disable": not self.devices.is_first}
        with tqdm(total=sum(len(model.cells) for model in models) * len(pairs), **shown) as self._bar:
            while models:
                target = models.pop(0)
                grid = [(cell, *pair) for cell in target.cells for pair in pairs]
                of_model = [(run[0], self._within_grid(target, *run, epochs)) for run in grid]
                self._check_borne(target, of_model)
                if until_saturated:
                    for p in dict.fromkeys(cell.p for cell in target.cells):
                        cells = [cell for cell in target.cells if cell.p == p]
                        for attacker, _ in attackers:
                            self._saturate(target, of_model, cells, attacker, epochs)
                curves += [curve for _, curve in of_model]
                del target
                if models:
                    gc.collect()  # two models at once may not fit
        return curves

    def _within_grid(
        self, target: SweptModel, cell: RelearnDataModule, attacker: Attacker, learning_rate: float, epochs: int
    ) -> RecoveryCurve:
        # A rate that is too high for one model does not cost what the others found: its curve ends where it diverged.
        try:
            return self._curve(target, cell, attacker, learning_rate, epochs)
        except Diverged as error:
            if self.devices.n_ranks > 1:  # which need not have failed all, or at the same place
                raise
            target.restore()
            self._too_high[id(error.curve)] = error
            self._bar.write(f"lightning-ssiuu: note: {error}; left out from there on", file=sys.stderr)
            self._bar.update()
            return error.curve

    def _check_borne(self, target: SweptModel, curves: Sequence[_Run]) -> None:
        for cell in target.cells:
            own = [curve for of, curve in curves if of is cell]
            if all(id(curve) in self._too_high for curve in own):
                raise self._too_high[id(min(own, key=lambda curve: curve.learning_rate))]

    def _curve(
        self, target: SweptModel, cell: RelearnDataModule, attacker: Attacker, learning_rate: float, epochs: int
    ) -> RecoveryCurve:
        log = self.log
        run = (target.name, cell.p, cell.seed, described(attacker.settings), learning_rate)
        curve = self._finished(run, epochs, attacker.repair_epochs)
        if attacked := curve is None:
            target.score_before(self.score, self.utility)
            if log is not None and self.devices.is_first:
                log.begin()  # no sooner: until a model is there, a mistake leaves nothing behind
            options = {name: getattr(self, name) for name in ("every_n_epochs", "patience", "lora", "utility")}
            curve = target.attack(cell, learning_rate, epochs, self.score, attacker=attacker, **options)
        assert curve is not None
        if target.name == "unlearned" and max(curve.forget_scores) > self._highest:
            self._highest = max(curve.forget_scores)
            if attacked and log is not None and log.saved is not None:
                model, tokenizer = target.loaded
                save_pretrained(model.hf, tokenizer, log.saved)
        if attacked:
            target.restore()
            if log is not None and self.devices.is_first:
                log.add(curve)  # after the model was saved: what counts as finished is whole
        self._bar.update()
        return curve

    def _finished(
        self, run: tuple[str, float | None, int, str, float], epochs: int, repair: int
    ) -> RecoveryCurve | None:
        finished = {} if self.log is None else self.log.finished
        for of, curve in finished.items():
            # One that ran out of patience is also what more epochs would have given, unless its last score was taken
            # only because it was the last.
            last = of[5] - repair
            ended = last % self.every_n_epochs == 0 and curve.has_ended(self.patience)
            if of[:5] == run and (last == epochs or (last < epochs and ended)):
                return curve
        return None

    def _saturate(
        self,
        target: SweptModel,
        curves: list[_Run],
        cells: Sequence[RelearnDataModule],
        attacker: Attacker,
        epochs: int,
    ) -> None:
        # Attack more and more strongly until the highest score of these cells lies inside what this attacker tried.
        settings, repair = attacker.settings, attacker.repair_epochs
        for _ in range(_MOST_WIDENINGS):
            own = [curve for cell, curve in curves if cell in cells and curve.attacker == settings]
            if (attack := stronger(own, repair + epochs)) is None:
                return
            rate, epochs = attack[0], attack[1] - repair
            try:
                further = [self._curve(target, cell, attacker, rate, epochs) for cell in cells]
            except NotFinite:  # stronger than a model bears, which nobody asked for by name
                target.restore()
                return
            for cell, curve in zip(cells, further, strict=True):
                # A longer attack begins as the shorter one did, and takes its place.
                of = settings, rate
                curves[:] = [(c, old) for c, old in curves if c is not cell or (old.attacker, old.learning_rate) != of]
                curves.append((cell, curve))

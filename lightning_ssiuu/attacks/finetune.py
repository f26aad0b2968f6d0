"""One relearning attack: fine-tune a model in memory, score it after every epoch, put its weights back."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.attackers import Attacker
from lightning_ssiuu.attacks.curves import RecoveryCurve
from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.devices import Devices, quiet_lightning
from lightning_ssiuu.training.shards import local
from lightning_ssiuu.utils.errors import NotFinite


class Diverged(NotFinite):
    """An attack that diverged at its learning rate; ``curve`` is what was scored before."""

    curve: RecoveryCurve


class Recorder(L.Callback):
    """Scores the attacked model after every so many epochs and after the last, into a curve.

    Ends the attack after ``patience`` scores that were no higher than the highest before them; None: never. ``after``
    is the number of epochs before it, in which the model was repaired; ``utility`` as :func:`attack_scores` has it.
    """

    def __init__(
        self,
        score: str,
        curve: RecoveryCurve,
        every_n_epochs: int = 1,
        patience: int | None = None,
        after: int = 0,
        utility: bool = False,
    ) -> None:
        self.score, self.curve, self.every_n_epochs, self.patience = score, curve, every_n_epochs, patience
        self.after, self.utility = after, utility

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs:
            attacked: Any = pl_module
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            model = attacked.model, attacked.tokenizer
            self.curve.add(
                self.after + epoch, attack_scores(*model, data, self.score, trainer.global_step, self.utility)
            )
            trainer.should_stop |= self.curve.has_ended(self.patience)


def attack_scores(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RelearnDataModule,
    score: str,
    step: int = 0,
    utility: bool = False,
) -> dict[str, float]:
    """``{"forget": percent}``: a model's score on what an attack is scored on, after so many steps of the attack.

    With ``utility`` also that of the retain and the test set of the data.
    """
    others = [data.source.eval_dataloader(split) for split in data.source.eval_splits[1:]] if utility else []
    scores = evaluate(model, tokenizer, [data.scored_batches(), *others], [score], step=step)
    return {split: of_split[score] for split, of_split in scores.items()}


def relearn(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RelearnDataModule,
    learning_rate: float,
    epochs: int,
    score: str = "probability",
    name: str = "unlearned",
    devices: Devices | None = None,
    every_n_epochs: int = 1,
    lora: LoRA | None = None,
    before: Mapping[str, float] | None = None,
    patience: int | None = None,
    attacker: Attacker | None = None,
    utility: bool = False,
) -> RecoveryCurve:
    """Attack a model in memory once; its weights are the attacked ones afterwards, or its adapters are.

    The curve is the same on any number of ranks, but for rounding. ``devices`` are launched (None: one device),
    adapters stay in the model until ``LoRA.detach``, and ``before`` are the scores before the attack where they are
    known: all attacks on a model begin with the same ones. ``patience`` is that of :class:`Recorder`; ``attacker`` None
    is AdamW, and may have adapters of its own instead of ``lora``; ``utility`` as :func:`attack_scores` has it.

    Raises:
        Diverged: If the attack diverges at this learning rate.
    """
    attacker = attacker if attacker is not None else Attacker()
    lora = attacker.lora if attacker.lora is not None else lora
    devices = devices if devices is not None else Devices()
    sizes, repair = (len(data.attacked), len(data.scored)), attacker.repair_epochs
    curve = RecoveryCurve(name, data.kind, data.p, learning_rate, data.seed, *sizes, attacker=attacker.settings)
    asked = model, tokenizer, data, score, 0, utility
    curve.add(0, attack_scores(*asked) if before is None else before)
    recorder = Recorder(score, curve, every_n_epochs, patience, repair, utility)

    def fit(on: RelearnDataModule, epochs: int, *callbacks: L.Callback) -> None:
        module = attacker.module(learning_rate, lora)
        module.adopt(model.train(), tokenizer)
        trainer = devices.trainer(epochs, [*attacker.callbacks(), *callbacks])
        try:
            trainer.fit(module, datamodule=on)
        finally:
            _release(trainer, module, on)

    with quiet_lightning():
        L.seed_everything(data.seed, verbose=False)
        if lora is not None:
            lora.attach(model.hf)
        try:
            if repair:
                fit(data.repairing(), repair)
                curve.add(repair, attack_scores(*asked))
            fit(data, epochs, recorder)
        except NotFinite as error:
            allowed = f"rates at which the {name} model stays one: {error.value} (seed {data.seed})"
            mistake = Diverged("attack.learning_rates", learning_rate, allowed)
            mistake.curve = curve
            raise mistake from error
    if devices.n_ranks > 1:
        gc.collect()  # DistributedDataParallel and its buckets of gradients
    return curve


def _release(trainer: Any, module: Any, data: RelearnDataModule) -> None:
    # Take apart what refers to each other: a sweep would hold several runs' optimiser states. Collecting garbage
    # instead takes a fifth of a second, which on a small model is a third of an attack.
    trainer.strategy.optimizers = []
    trainer.strategy._lightning_module = trainer.strategy.model = None
    module._trainer = data.trainer = None


class Snapshot:
    """A model's weights in main memory (of sharded ones this rank's): one load serves a whole sweep."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tensors = {name: local(t).to("cpu", copy=True) for name, t in model.state_dict().items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in self.model.state_dict().items():
            local(tensor).copy_(self.tensors[name])
        for parameter in self.model.parameters():
            parameter.grad = None

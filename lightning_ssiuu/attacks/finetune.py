"""One relearning attack: fine-tune a model in memory, score it after every epoch, put its weights back."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.curves import RecoveryCurve
from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.training.devices import Devices, quiet_lightning


class Recorder(L.Callback):
    """Scores the attacked model after every so many epochs and after the last.

    Args:
        score: A score's name.
        curve: Receives the scores.
        every_n_epochs: Epochs from one score to the next.
    """

    def __init__(self, score: str, curve: RecoveryCurve, every_n_epochs: int = 1) -> None:
        self.score, self.curve, self.every_n_epochs = score, curve, every_n_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs:
            attacked: Any = pl_module
            score = attack_score(attacked.model, attacked.tokenizer, trainer.datamodule, self.score)  # type: ignore[attr-defined]
            self.curve.epochs.append(epoch)
            self.curve.forget_scores.append(score)


def attack_score(model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: RelearnDataModule, score: str) -> float:
    """A model's score on what an attack is scored on, in percent."""
    return evaluate(model, tokenizer, [data.scored_batches()], [score])["forget"][score]


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
    before: float | None = None,
) -> RecoveryCurve:
    """Attack a model in memory once; its weights are the attacked ones afterwards, or its adapters are.

    The curve is the same on any number of ranks, but for rounding.

    Args:
        model: The model to attack.
        tokenizer: Its tokenizer.
        data: What to train on and what to score.
        learning_rate: AdamW's, > 0.
        epochs: Passes over the attack set, ≥ 1.
        score: A score's name.
        name: Written into the curve.
        devices: Launched; None: one device.
        every_n_epochs: Epochs from one score to the next; scoring can cost more than the attack.
        lora: Train adapters instead of the weights; they stay in the model until ``LoRA.detach``.
        before: The score before the attack, where it is known: all attacks on a model begin with the same one.

    Returns:
        The recovery curve.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> from lightning_ssiuu.models.loading import load_model, load_tokenizer
        >>> model = AnswerModel(load_model("tiny"))
        >>> data = RelearnDataModule(Facts(), kind="harmful", p=0.1)
        >>> curve = relearn(model, load_tokenizer("tiny"), data, learning_rate=1e-4, epochs=1)
        >>> len(curve.forget_scores), curve.n_attack, curve.n_scored
        (2, 4, 32)
    """
    sizes = len(data.attacked), len(data.scored)
    curve = RecoveryCurve(name, data.kind, data.p, learning_rate, data.seed, *sizes, [0])
    curve.forget_scores.append(attack_score(model, tokenizer, data, score) if before is None else before)
    module = FineTuning(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0), lora=lora
    )
    devices = devices if devices is not None else Devices()
    with quiet_lightning():
        L.seed_everything(data.seed, verbose=False)
        if lora is not None:
            lora.attach(model.hf)
        module.adopt(model.train(), tokenizer)
        trainer = devices.trainer(epochs, [Recorder(score, curve, every_n_epochs)])
        trainer.fit(module, datamodule=data)
    _release(trainer, module, data)
    if devices.n_ranks > 1:
        gc.collect()  # DistributedDataParallel and its buckets of gradients
    return curve


def _release(trainer: Any, module: Any, data: RelearnDataModule) -> None:
    """Take apart what refers to each other: a sweep would hold several runs' optimiser states.

    Collecting garbage instead takes a fifth of a second, which on a small model is a third of an attack.
    """
    trainer.strategy.optimizers = []
    trainer.strategy._lightning_module = trainer.strategy.model = None
    module._trainer = data.trainer = None


class Snapshot:
    """A model's weights in main memory, to be put back after each attack: one load serves a whole sweep.

    Of weights that are cut over the ranks, each rank keeps its shard.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> snapshot = Snapshot(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> snapshot.restore()
        >>> bool((layer.weight == snapshot.tensors["weight"]).all())
        True
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tensors = {name: _local(t).to("cpu", copy=True) for name, t in model.state_dict().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back and drop the gradients."""
        for name, tensor in self.model.state_dict().items():
            _local(tensor).copy_(self.tensors[name])
        for parameter in self.model.parameters():
            parameter.grad = None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

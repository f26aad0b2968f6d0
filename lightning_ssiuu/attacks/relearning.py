"""Relearning attacks: fine-tune the unlearned model a little and see whether the secret comes back.

Protocol: arXiv 2509.22263, Sec. 4: the score is the highest forget score seen during the attack, over learning rates,
on examples the attack did not train on; mean over seeds.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules import RelearnDataModule
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.training.devices import Devices, quiet_lightning
from lightning_ssiuu.utils.errors import UserError


@dataclass
class RecoveryCurve:
    """The forget score along one attack: before it, and after each epoch.

    Args:
        model: ``"unlearned"`` or ``"oracle"``.
        kind: ``"harmful"`` or ``"benign"``.
        p: Attacked fraction of the forget set; None for benign attacks.
        learning_rate: AdamW's.
        seed: Of the selection and the order.
        n_attack: Examples trained on.
        n_scored: Examples scored.
        epochs: When the model was scored: 0 is before the attack.
        forget_scores: Percent, one for each of ``epochs``.
    """

    model: str
    kind: str
    p: float | None
    learning_rate: float
    seed: int
    n_attack: int
    n_scored: int
    epochs: list[int] = field(default_factory=list)
    forget_scores: list[float] = field(default_factory=list)


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
        """Score the model after an epoch."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs:
            attacked: Any = pl_module
            score = forget_score(attacked.model, attacked.tokenizer, trainer.datamodule, self.score)  # type: ignore[attr-defined]
            self.curve.epochs.append(epoch)
            self.curve.forget_scores.append(score)


def forget_score(model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: RelearnDataModule, score: str) -> float:
    """A model's score on what an attack is scored on, in percent.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        data: Of the attack.
        score: A score's name.
    """
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

    Raises:
        UserError: If an argument is outside its range.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> from lightning_ssiuu.models.loading import load_model, load_tokenizer
        >>> model = AnswerModel(load_model("tiny"))
        >>> data = RelearnDataModule(Facts(), kind="harmful", p=0.1)
        >>> curve = relearn(model, load_tokenizer("tiny"), data, learning_rate=1e-4, epochs=1)
        >>> len(curve.forget_scores), curve.n_attack, curve.n_scored
        (2, 4, 32)
    """
    check_attack(score, [learning_rate], epochs, every_n_epochs)
    splits = data.splits
    p = data.p if data.kind == "harmful" else None
    curve = RecoveryCurve(name, data.kind, p, learning_rate, data.seed, len(splits.retain), len(splits.forget), [0])
    curve.forget_scores.append(forget_score(model, tokenizer, data, score) if before is None else before)
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


def check_attack(score: str, learning_rates: Sequence[float], epochs: int, every_n_epochs: int = 1) -> None:
    """Raise :class:`UserError` unless the options of an attack are within their ranges.

    Example:
        >>> check_attack("probability", [0.0], 1)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: learning_rates: got 0.0, allowed: finite numbers > 0
    """
    check_score(score, "score")
    for learning_rate in learning_rates:
        if not 0 < learning_rate < math.inf:
            raise UserError("learning_rates", learning_rate, "finite numbers > 0")
    for name, value in (("epochs", epochs), ("every_n_epochs", every_n_epochs)):
        if value < 1:
            raise UserError(name, value, "a number ≥ 1")


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


def summarise(curves: Sequence[RecoveryCurve]) -> dict[str, Any]:
    """Score of one attack on one model: per seed the highest forget score over learning rates and epochs.

    Args:
        curves: All learning rates and seeds of one kind and p, of one model.

    Returns:
        ``before`` and ``forget_score`` as ``{mean, std, per_seed}`` in percent (std over seeds, n − 1; 0 for one seed),
        ``best`` (learning rate and epoch of the highest score of all), ``inside_grid``: whether neither lies at the
        upper end of what was tried, in which case a stronger attack may find more.

    Example:
        >>> curves = [RecoveryCurve("unlearned", "harmful", 0.1, rate, 0, 4, 36, [0, 1, 2], scores)
        ...           for rate, scores in ((1e-5, [5.0, 6.0, 6.0]), (1e-4, [5.0, 20.0, 18.0]), (1e-3, [5.0, 9.0, 2.0]))]
        >>> summary = summarise(curves)
        >>> summary["forget_score"]["mean"], summary["best"], summary["inside_grid"]
        (20.0, {'learning_rate': 0.0001, 'epoch': 1}, True)
    """
    seeds = sorted({curve.seed for curve in curves})
    highest = [max(max(c.forget_scores) for c in curves if c.seed == seed) for seed in seeds]
    before = [next(c.forget_scores[0] for c in curves if c.seed == seed) for seed in seeds]
    # Of equals the gentlest: an attack that finds nothing does not ask for a stronger one.
    best = max(sorted(curves, key=lambda curve: curve.learning_rate), key=lambda curve: max(curve.forget_scores))
    epoch = best.epochs[max(range(len(best.forget_scores)), key=best.forget_scores.__getitem__)]
    inside = best.learning_rate < max(c.learning_rate for c in curves) and epoch < best.epochs[-1]
    return {
        "before": spread(before),
        "forget_score": spread(highest),
        "best": {"learning_rate": best.learning_rate, "epoch": epoch},
        "inside_grid": inside,
    }


def stronger(curves: Sequence[RecoveryCurve]) -> tuple[float, int] | None:
    """The next attack to try where the highest score lies at the edge of what was tried.

    Args:
        curves: All learning rates and seeds of one kind and p, of one model.

    Returns:
        Learning rate and epochs: a larger rate (by the ratio of the two largest, at least 2) if the best one is the
        largest, else the best one for twice the epochs; None if the best lies inside.

    Example:
        >>> stronger([RecoveryCurve("unlearned", "harmful", 0.1, 1e-4, 0, 4, 36, [0, 1], [5.0, 9.0])])
        (0.0003, 1)
    """
    summary = summarise(curves)
    if summary["inside_grid"]:
        return None
    rates = sorted({curve.learning_rate for curve in curves})
    best, epochs = summary["best"], max(curve.epochs[-1] for curve in curves)
    if best["learning_rate"] == rates[-1]:
        factor = max(2.0, rates[-1] / rates[-2]) if len(rates) > 1 else 3.0
        return float(f"{rates[-1] * factor:.3g}"), epochs
    return best["learning_rate"], 2 * epochs


def spread(values: Sequence[float]) -> dict[str, Any]:
    """``{mean, std, per_seed}``, std with n − 1.

    Example:
        >>> spread([1.0, 3.0])
        {'mean': 2.0, 'std': 1.4142135623730951, 'per_seed': [1.0, 3.0]}
    """
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else 0.0,
        "per_seed": list(values),
    }


def table(curves: Sequence[RecoveryCurve]) -> list[dict[str, Any]]:
    """One row per attack: the unlearned model's summary, the oracle's, and the gap seed by seed.

    Example:
        >>> curves = [RecoveryCurve(model, "harmful", 0.1, 1e-4, 0, 4, 36, [0, 1], [5.0, top])
        ...           for model, top in (("unlearned", 30.0), ("oracle", 12.0))]
        >>> table(curves)[0]["gap"]["mean"]
        18.0
    """
    rows = []
    for kind, p in dict.fromkeys((curve.kind, curve.p) for curve in curves):
        mine = [curve for curve in curves if (curve.kind, curve.p) == (kind, p)]
        row: dict[str, Any] = {"kind": kind, "p": p, "n_attack": mine[0].n_attack, "n_scored": mine[0].n_scored}
        for name in dict.fromkeys(curve.model for curve in mine):
            row[name] = summarise([curve for curve in mine if curve.model == name])
        if "oracle" in row and "unlearned" in row:
            pairs = zip(
                row["unlearned"]["forget_score"]["per_seed"], row["oracle"]["forget_score"]["per_seed"], strict=True
            )
            row["gap"] = spread([ours - oracle for ours, oracle in pairs])
        rows.append(row)
    return rows

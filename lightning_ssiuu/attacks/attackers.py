"""How an attacker fine-tunes: its optimiser, warm-up and gradients, and what it does before it comes to the secret."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.training.optimizers import Muon
from lightning_ssiuu.training.schedules import find_schedule
from lightning_ssiuu.training.shards import wide
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice

OptimizerName = Literal["adamw", "sgd", "muon"]
Gradient = Literal["whole", "principal", "minor"]


@dataclass(frozen=True)
class Attacker:
    """One way to fine-tune in a relearning attack. An attack may have several; its score is the highest of them all.

    What was hardened against one attacker need not stand another one. *Adaptive* are ``repair_epochs``, against a model
    whose damage keeps an attack from learning anything, and ``muon`` and ``gradient``, against methods that damp or
    leave out some directions of the weights.

    Args:
        optimizer: ``adamw``, ``sgd`` (with momentum 0.9) or ``muon`` (:class:`~lightning_ssiuu.Muon`), without weight
            decay. Muon whitens: it makes all singular values of a matrix's momentum about equal, so that directions in
            which the gradient was made small are trained as fast as the others. AdamW's learning rates suit it; SGD
            needs larger ones.
        learning_rates: Its own; None: the attack's.
        warmup_steps: Steps in which the rate rises from 0, or below 1 the share of all steps.
        repair_epochs: Epochs on the retain set before the attack, with an optimiser of their own, of the same kind and
            rate. They count among the epochs of the curve, whose first score after 0 is that of the repaired model.
        gradient: Of each matrix's gradient, trained on is the ``whole``, its ``rank`` ``principal`` singular directions
            alone, or the ``minor`` ones without those. What the optimiser makes of it may leave that subspace.
        rank: Number of principal directions, at least 1.
        lora: Adapters instead of the weights; None: as the attack has it.

    Raises:
        UserError: If an option is outside its range, or this torch has no Muon.

    Example:
        >>> Attacker(optimizer="sgd", learning_rates=[0.1, 1.0]).settings
        {'optimizer': 'sgd'}
    """

    optimizer: OptimizerName = "adamw"
    learning_rates: Sequence[float] | None = None
    warmup_steps: float = 0.0
    repair_epochs: int = 0
    gradient: Gradient = "whole"
    rank: int = 8
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        check_choice("attack.attackers.optimizer", self.optimizer, OptimizerName)
        check_choice("attack.attackers.gradient", self.gradient, Gradient)
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            allowed = "adamw, sgd: torch has Muon from version 2.9 on"
            raise UserError("attack.attackers.optimizer", self.optimizer, allowed)
        if self.learning_rates is not None:
            check_rates("attack.attackers.learning_rates", self.learning_rates)
        try:
            find_schedule("constant_with_warmup", self.warmup_steps)
        except UserError as error:
            raise UserError(f"attack.attackers.{error.argument}", error.value, error.allowed) from error
        check_at_least("attack.attackers.repair_epochs", self.repair_epochs, 0)
        check_at_least("attack.attackers.rank", self.rank, 1)

    @property
    def settings(self) -> dict[str, Any]:
        """What it does otherwise than the default, AdamW on all weights; without the learning rates."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        del values["learning_rates"]
        if self.gradient == "whole":
            del values["rank"]  # of no effect
        return {
            name: asdict(value) if isinstance(value, LoRA) else value
            for name, (value, default) in values.items()
            if value != default or name == "rank"
        }

    def module(self, learning_rate: float, lora: LoRA | None) -> FineTuning:
        """The objective that fine-tunes at this rate."""

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            if self.optimizer == "sgd":
                return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
            kind: Any = Muon if self.optimizer == "muon" else torch.optim.AdamW
            return kind(parameters, lr=learning_rate, weight_decay=0.0)

        warmup: dict[str, Any] = {}
        if self.warmup_steps:
            warmup = {"lr_scheduler": "constant_with_warmup", "warmup_steps": self.warmup_steps}
        module = FineTuning(optimizer=optimizer, lora=lora, **warmup)
        module.shares = True
        return module

    def callbacks(self) -> list[L.Callback]:
        """What changes the gradients on their way to the optimiser."""
        return [] if self.gradient == "whole" else [Projected(self.rank, self.gradient == "principal")]


def check_rates(argument: str, rates: Any) -> None:
    """Refuse what is no list of learning rates."""
    if isinstance(rates, str) or not isinstance(rates, Sequence) or not rates:
        raise UserError(argument, rates, "a list of at least one value")
    for rate in rates:
        if not 0 < rate < math.inf:
            raise UserError(argument, rate, "finite numbers > 0")


class Projected(L.Callback):
    """Keeps of each matrix's gradient its ``rank`` largest singular directions alone, or removes them."""

    def __init__(self, rank: int, keep: bool) -> None:
        self.rank, self.keep = rank, keep

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None and parameter.grad.ndim == 2:
                project(parameter.grad, self.rank, self.keep)


@torch.no_grad()
def project(gradient: Tensor, rank: int, keep: bool) -> None:
    """Keep the ``rank`` largest singular directions of a matrix alone, or remove them; in place.

    They are found by a randomised decomposition (Halko et al., arXiv 0909.4061, Alg. 4.4) from a fixed start, in
    float32 at least, which is exact where the matrix has no higher rank than that.

    Example:
        >>> gradient = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> project(gradient, 1, keep=False)
        >>> gradient.diag().round(decimals=4).abs().tolist()
        [0.0, 2.0, 1.0]
    """
    whole = wide(gradient)
    with torch.random.fork_rng([gradient.device] if gradient.is_cuda else []):
        torch.manual_seed(0)  # the same on every rank
        left = torch.svd_lowrank(whole, min(rank + 8, *whole.shape), niter=4)[0][:, :rank]
    principal = left @ (left.mT @ whole)
    gradient.copy_(principal if keep else whole - principal)

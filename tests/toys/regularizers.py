"""What the tests of several regularisers share: the reference written from the formulas, and short runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from toys.models import (
    Recorder,
    bare_trainer,
    example_log_probability,
    loader,
    norm,
)

from lightning_ssiuu.models.answers import AnswerModel

LR = 0.02


class Reference:
    """The formulas, one example at a time, nothing clever."""

    def __init__(
        self,
        hf: nn.Module,
        weight: float,
        mode: str,
        anchor: str,
        target: str,
        names: str = "",
        forget_only: bool = False,
    ) -> None:
        self.hf, self.weight, self.mode, self.anchor, self.target = copy.deepcopy(hf), weight, mode, anchor, target
        self.named = dict(self.hf.named_parameters())
        self.regularized = [name for name in self.named if names in name]
        self.before: dict[str, Tensor] | None = None
        self.forget_only = forget_only

    def grad(self, value: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.named, torch.autograd.grad(value, list(self.named.values())), strict=True))

    def nll(self, some: dict[str, Tensor]) -> Tensor:
        rows = [example_log_probability(self.hf, some, row) for row in range(len(some["input_ids"]))]
        return torch.stack([-logp / n for logp, n in rows]).mean()

    def step(self, micro: Sequence[dict[str, Any]], clip: float | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Returns (penalty alone, everything) and takes an SGD step."""
        total = {name: torch.zeros_like(p) for name, p in self.named.items()}
        g = {name: torch.zeros_like(p) for name, p in self.named.items()}
        for one in micro:
            loss = -self.nll(one["forget"]) + (0 if self.forget_only else self.nll(one["retain"]))
            for name, value in self.grad(loss / len(micro)).items():
                total[name] += value
            for row in range(len(one["forget"]["input_ids"])):
                logp, n = example_log_probability(self.hf, one["forget"], row)
                probability = (logp if self.target == "sequence" else logp / n).exp()
                for name, value in self.grad(probability).items():
                    g[name] += value
        now = {name: p.detach() * g[name] for name, p in self.named.items()}
        penalty = {name: torch.zeros_like(p) for name, p in self.named.items()}
        if self.before is not None:
            for name in self.regularized:
                penalty[name] = 2 * (now[name] - self.before[name]) * g[name] * (now[name] < 0)
            if self.mode == "absolute":
                factor = self.weight
            else:
                factor = self.weight * norm(total.values()) / norm(penalty.values())
            penalty = {name: factor * value for name, value in penalty.items()}
        if self.before is None or self.anchor == "previous":
            self.before = now
        total = {name: value + penalty[name] for name, value in total.items()}
        if clip is not None:
            scale = min(1.0, clip / (norm(total.values()) + 1e-6))
            total = {name: value * scale for name, value in total.items()}
        with torch.no_grad():
            for name, p in self.named.items():
                p -= LR * total[name]
        return list(penalty.values()), list(total.values())


def trained(module: Any, model: AnswerModel, batches: Sequence[Any], steps: int, **kwargs: Any) -> list[list[Tensor]]:
    """Train through a real Trainer; gradients as the optimiser saw them, per step."""
    log: list[list[Tensor]] = []
    module.optimizer = lambda params: Recorder(params, lr=LR, log=log)
    module.adopt(model, None)
    model.train()
    bare_trainer(steps, **kwargs).fit(module, loader(batches))
    return log


class Split(L.Callback):
    """The objective's own gradient: callbacks run before the module's hook, in which the regulariser acts."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in pl_module.model.parameters()])

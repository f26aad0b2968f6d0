"""What the tests of the single pass share: gradients of one and of two passes, and losses that allow one or not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from toys.models import bare_trainer, batch, loader, weights

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.objectives.npo import npo
from lightning_ssiuu.regularizers import AttributionRegularizer, Regularizer

WEIGHT = 1e4


class Spy(AttributionRegularizer):
    """Keeps g of every step; forget and retain part go in one pass however g is taken."""

    differentiates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[Tensor]] = []

    def apply(self, model: nn.Module) -> dict[str, float]:
        whole = [torch.zeros(()) if g is None else g * math.exp(self._scale) for g in self._gradients or []]
        self.seen.append(whole)
        return super().apply(model)


def gradients(
    model: AnswerModel, passes: str, objective: Any = "GradientDifference", steps: int = 2, **kwargs: Any
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Of every step: g; and the weights at the end."""
    torch.manual_seed(0)
    accumulate, batches = kwargs.pop("accumulate", 1), kwargs.pop("batches", None)
    options = {key: kwargs.pop(key) for key in ("target", "modules") if key in kwargs}
    spy = Spy(WEIGHT, passes=passes, **options)
    make = objectives()[objective] if isinstance(objective, str) else objective
    module = make(regularizer=spy, **kwargs)
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.02)
    module.adopt(model.train(), None)
    batches, before = batches or [batch(n) for n in range(steps * accumulate)], hooks(model)
    bare_trainer(steps, accumulate_grad_batches=accumulate).fit(module, loader(batches))
    assert len(spy.seen) == steps
    assert hooks(model) == before
    return spy.seen, weights(model)


class Looks(Regularizer):
    """Differentiates log P shortly before the loss is differentiated."""

    def collect(self, model: nn.Module, answers: Any, part: Any) -> None:
        self.logps = answers.logps

    def before_backward(self, model: nn.Module, loss: Tensor) -> None:
        self.logps.sum().backward(retain_graph=True)
        model.zero_grad()

    def apply(self, model: nn.Module) -> dict[str, float]:
        return {}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def difference(ones: list[list[Tensor]], twos: list[list[Tensor]]) -> float:
    """The largest, of any parameter in any step, relative to that parameter's g."""
    pairs = [pair for one, two in zip(ones, twos, strict=True) for pair in zip(one, two, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs if b.count_nonzero())
    return max(((a - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in pairs)


class LogisticLoss(UnlearningModule):
    """NPO against a made-up reference: every sequence has another slope."""

    def forget_loss(self, batch: Any) -> Tensor:
        answers = self.answers(batch)
        return npo(answers, answers.logps.detach() - torch.arange(len(answers.logps)), 0.3)


class Logits(UnlearningModule):
    """Depends on the logits beside log P."""

    def forget_loss(self, batch: Any) -> Tensor:
        answers = self.answers(batch)
        return answers.logps.mean() + 1e-9 * answers.logits.mean()


class Hidden(UnlearningModule):
    """Depends on an embedding beside log P."""

    def forget_loss(self, batch: Any) -> Tensor:
        kept: list[Tensor] = []
        layer = self.model.hf.model.layers[0].mlp.down_proj
        handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
        loss = self.answers(batch).logps.mean()
        handle.remove()
        return loss + kept[0].square().mean()


class Subset(UnlearningModule):
    """Of two sequences alone."""

    def forget_loss(self, batch: Any) -> Tensor:
        return self.answers(batch).logps[1:].mean()


class Other(UnlearningModule):
    """Of the retain answers; the forget answers are for the regulariser alone."""

    def forget_loss(self, batch: Any) -> Tensor:
        return self.answers(dict(batch)).logps.mean()


class Scaled(nn.Linear):
    """No layer that is known."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

"""Training of the objectives that move weights within a step, and their reference: copies of the weights, autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from toys.models import (
    Recorder,
    answer_model,
    bare_trainer,
    example_log_probability,
    loader,
    part,
)

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.adversarial_unlearning import AdversarialUnlearning
from lightning_ssiuu.objectives.elicited_unlearning import ElicitedUnlearning
from lightning_ssiuu.objectives.mudman import MUDMAN
from lightning_ssiuu.objectives.sam import SAM

#: All that move weights within a step.
ALL = (AdversarialUnlearning, SAM, MUDMAN, ElicitedUnlearning)
LENGTHS = [(3, 1), (5, 2), (2, 3), (4, 4), (3, 2)]
Loss = Callable[[nn.Module], Tensor]


def a_batch(seed: int) -> dict[str, dict[str, Tensor]]:
    return {"forget": part(LENGTHS, 2 * seed), "retain": part([(4, 2), (3, 4)], 2 * seed + 1)}


def trained(
    module: Any, batches: list[Any], model: AnswerModel | None = None, lr: float = 0.1, **kwargs: Any
) -> tuple[AnswerModel, list[list[Tensor]]]:
    """The model after training, and the gradients of each optimiser step."""
    model, log = model or answer_model(tie_word_embeddings=False), []
    module.optimizer = lambda parameters: Recorder(parameters, lr, log)
    module.adopt(model.train(), None)
    bare_trainer(**{"max_steps": len(batches), **kwargs}).fit(module, loader(batches))
    return model, log


# ---- the reference: copies of the weights, one example at a time ---------------------------------------------------


def nll(some: dict[str, Tensor], rows: list[int]) -> Loss:
    def loss(hf: nn.Module) -> Tensor:
        values = [example_log_probability(hf, some, row) for row in rows]
        return sum(-logp / n for logp, n in values) / len(rows)

    return loss


def gradient(model: AnswerModel, at: list[Tensor], loss: Loss) -> list[Tensor]:
    """``∂loss/∂φ`` of a copy of the model with other weights."""
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for parameter, value in zip(hf.parameters(), at, strict=True):
            parameter.copy_(value)
    hf.zero_grad()
    loss(hf).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in hf.parameters()]


def value_at(model: AnswerModel, at: list[Tensor], loss: Loss) -> float:
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for parameter, value in zip(hf.parameters(), at, strict=True):
            parameter.copy_(value)
        return loss(hf).item()


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((t * t).sum()) for t in tensors))


def plus(left: list[Tensor], right: list[Tensor], factor: float = 1.0) -> list[Tensor]:
    return [a + factor * b for a, b in zip(left, right, strict=True)]


class AtStep:
    """Stands for a trainer."""

    def __init__(self, step: int) -> None:
        self.global_step = step


def the_adversarys(
    module: AdversarialUnlearning, forget: dict[str, Tensor], step: int = 0
) -> tuple[list[int], list[int]]:
    module._trainer = AtStep(step)  # type: ignore[assignment]
    learned, rest = module.divided(forget)
    return learned.tolist(), rest.tolist()

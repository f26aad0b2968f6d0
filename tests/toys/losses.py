"""Slow references for losses: every example's own logits, and probabilities by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.data import byte_tokenizer
from toys.models import distance, norm, random_model

from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.training.reference import LiveReference

#: Of one example: for each answer token the logits that predict it, and the token.
Predictions = list[tuple[Tensor, int]]
UNEQUAL = [(3, 1), (5, 4), (2, 3), (7, 2)]


def predictions(hf: nn.Module, part: Mapping[str, Tensor]) -> list[Predictions]:
    """By example, each run alone and without padding, from the full logits."""
    found = []
    for ids, mask, labels in zip(part["input_ids"], part["attention_mask"], part["labels"].tolist(), strict=True):
        logits = hf(input_ids=ids[: int(mask.sum())].unsqueeze(0)).logits[0]
        found.append([(logits[k - 1], label) for k, label in enumerate(labels) if label != -100])
    return found


def probabilities(logits: Tensor) -> Tensor:
    """By the definition, without a shift."""
    return logits.exp() / logits.exp().sum()


def total(values: Sequence[Tensor]) -> Tensor:
    """Added up one after the other."""
    return sum(values[1:], values[0])


def mean(values: Sequence[Tensor]) -> Tensor:
    """The total, shared out."""
    return total(values) / len(values)


def log_probability(tokens: Predictions) -> Tensor:
    """Of a whole answer, in nats."""
    return total([probabilities(z)[y].log() for z, y in tokens])


def gradient(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """By parameter; zeros where the loss does not depend on one."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def with_models(module: UnlearningModule, seed: int = 0, reference_seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """Give an objective a random model and another one for its original; both models."""
    model = random_model(seed=seed, vocab_size=260)
    original = random_model(seed=reference_seed, vocab_size=260)
    module.adopt(AnswerModel(model), byte_tokenizer())
    module._reference = LiveReference(AnswerModel(original), module.references())
    return model, original


def answers(logits: Any, targets: Sequence[int], sequence_index: Sequence[int] | None = None) -> Answers:
    """Of given logits, by default of one sequence."""
    index = torch.tensor([0] * len(targets) if sequence_index is None else list(sequence_index))
    values = logits if isinstance(logits, Tensor) else torch.tensor(logits, dtype=torch.float64)
    return Answers(values, torch.tensor(list(targets)), index, int(index.max()) + 1)


def logit_gradient(loss: Callable[[Answers], Tensor], some: Answers) -> Tensor:
    """``[N, V]`` of a loss by the logits."""
    logits = some.logits.detach().clone().requires_grad_()
    loss(Answers(logits, some.targets, some.sequence_index, some.n_sequences)).backward()
    assert logits.grad is not None
    return logits.grad


def check_by_hand(objective: Any, by_hand: Any, forget: Any, options: dict[str, float]) -> None:
    """Loss and gradient on ``forget`` are those of a function of ``(model, original, **options)``."""
    model, original = with_models(objective)
    loss, expected = objective.forget_loss(forget), by_hand(model, original, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = gradient(expected, model)
    assert norm(wanted) > 1e-3
    assert distance(gradient(loss, model), wanted) < 1e-11


def projector_by_hand(values: Tensor, components: int) -> Tensor:
    """``[D, D]`` onto the span of the mean and of the covariance's leading eigenvectors, through normal equations."""
    centred = values - values.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred)
    span = torch.cat([vectors[:, eigenvalues.argsort(descending=True)[:components]], values.mean(0)[:, None]], 1)
    return span @ torch.linalg.solve(span.T @ span, span.T)

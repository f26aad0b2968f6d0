"""Objectives whose forget gradient is taken at other weights than those it is applied to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.training.shards import reshard
from lightning_ssiuu.utils.distributed import mean_over_ranks, world_size

if TYPE_CHECKING:
    from lightning_ssiuu.objectives.base import UnlearningModule


def displaced_step(module: UnlearningModule, batch: Mapping[str, Part]) -> Tensor:
    """A training step of an objective with ``displaces_weights``: keep the forget gradient for the optimiser step.

    Over the micro-batches of an optimiser step the forget gradients are averaged as the losses are.

    Args:
        module: The objective; its ``displaced_gradient`` is asked.
        batch: A training batch with a forget part.

    Returns:
        The loss for Lightning to differentiate, of which only the retain loss has a gradient.
    """
    gradients, addend = module.displaced_gradient(batch["forget"])
    torch._foreach_mul_(gradients, module.forget_weight / n_micro_batches(module))
    if module.forget_gradients is None:
        module.forget_gradients = gradients
    else:
        torch._foreach_add_(module.forget_gradients, gradients)
    losses = {"forget_loss": addend.detach() * world_size()}  # a sum over ranks, where the other is a mean
    with module._step_memory:
        retained = "retain" in batch and module.retain_weight > 0
        # Without a retain loss Lightning needs a loss of this graph all the same.
        answers = module.answers(batch["forget"]) if module.regularizer is not None or not retained else None
        if module.regularizer is not None and answers is not None:
            module.regularizer.collect(module.model, answers, batch["forget"])
        if retained:
            losses["retain_loss"] = module.retain_loss(batch["retain"])
            loss = module.retain_weight * losses["retain_loss"]
        elif answers is not None:
            loss = 0.0 * answers.logits.sum()
    module.log_dict({f"train/{k}": v for k, v in mean_over_ranks(losses).items()}, batch_size=1)
    return loss + module.forget_weight * losses["forget_loss"]


def complete_gradients(module: UnlearningModule) -> None:
    """Put what :func:`displaced_step` kept into ``.grad``, before the regulariser and clipping see it."""
    gradients, module.forget_gradients = module.forget_gradients, None
    if gradients is not None:
        reshard(module.model)
        module.combine([p for p in module.model.parameters() if p.requires_grad], gradients)


def n_micro_batches(module: UnlearningModule) -> int:
    """Micro-batches of an optimiser step, by which Lightning divides the losses; 1 outside a Trainer."""
    return 1 if module._trainer is None else module.trainer.accumulate_grad_batches

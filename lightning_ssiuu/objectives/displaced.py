"""Objectives whose forget gradient is taken at other weights than those it is applied to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.backbone import values_of
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.divergence import finite_losses
from lightning_ssiuu.objectives.gradient_difference import gradient_difference_like
from lightning_ssiuu.training.perturbation import add_gradients
from lightning_ssiuu.training.shards import local, local_state, trained_parameters
from lightning_ssiuu.utils.distributed import mean_over_ranks, world_size


class DisplacedObjective(UnlearningModule):
    """An objective on any backbone's losses that takes the forget gradient elsewhere; write ``displaced_gradient``.

    The retain loss and the regulariser see the original weights. Over the micro-batches of an optimiser step the forget
    gradients are averaged as the losses are; they are added to ``.grad`` before the regulariser and clipping see it.
    A static graph of DDP is refused when training starts, and so is float16, whose loss scaling knows the loss's own
    gradient alone.

    Args:
        backbone: Any objective whose losses and weights are used; None takes gradient difference.
    """

    can_be_backbone = False
    takes_token_means = False  # ranks' shares are weighed by their rows

    def __init__(self, backbone: UnlearningModule | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_backbone(backbone or gradient_difference_like(self))
        self._forget_gradients: list[Tensor] | None = None  # of this step's micro-batches so far

    def displaced_gradient(self, batch: Part) -> tuple[list[Tensor], Tensor]:
        """The forget loss's gradient over all ranks at other weights, and this rank's addend of the loss.

        The first as :func:`lightning_ssiuu.training.perturbation.gradient_at` gives it for all trained parameters; the
        second is a scalar in nats.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define displaced_gradient(batch)")

    def combine(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Put the step's forget gradient, times ``forget_weight``, into ``.grad``, by default by adding."""
        add_gradients(parameters, gradients)

    def running_mean(
        self, means: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], rate: float
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """``m ← m + rate · (.grad − m)`` by parameter name, from 0 on; the means and this rank's parts of them.

        ``.grad`` is there afterwards, zero where the loss gave none.
        """
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not means:
            means = {name: torch.zeros_like(p) for name, p in parameters.items()}
        means, parts = local_state(means, parameters)
        for part, parameter in zip(parts, parameters.values(), strict=True):
            part.lerp_(local(parameter.grad).to(part.dtype), rate)  # type: ignore[arg-type]
        return means, parts

    def unwritten(self) -> str | None:
        own = type(self).displaced_gradient is not DisplacedObjective.displaced_gradient
        return None if own else "displaced_gradient"

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches of an optimiser step, by which Lightning divides the losses; 1 outside a Trainer."""
        return 1 if self._trainer is None else self.trainer.accumulate_grad_batches

    @property
    def second_gradient(self) -> str:
        return type(self).__name__

    def training_step(self, batch: Mapping[str, Part], batch_idx: int) -> Tensor:
        if "forget" not in batch or self.forget_weight == 0:
            return super().training_step(batch, batch_idx)
        gradients, addend = self.displaced_gradient(batch["forget"])
        torch._foreach_mul_(gradients, self.forget_weight / self.n_micro_batches)
        if self._forget_gradients is None:
            self._forget_gradients = gradients
        else:
            torch._foreach_add_(self._forget_gradients, gradients)
        losses = {"forget_loss": addend.detach() * world_size()}  # a sum over ranks, where the other is a mean
        with self._step_memory:
            if self.regularizer is not None:
                self.regularizer.collect(self.model, self.answers(batch["forget"]), batch["forget"])
            kept = self.kept_losses(batch["forget"])
            loss = sum(weight * value for weight, value in kept.values())
            if "retain" in batch and self.retain_weight > 0:
                losses["retain_loss"] = self.retain_loss(batch["retain"])
                loss = loss + self.retain_weight * losses["retain_loss"]
            elif not kept:  # Lightning needs a loss of this graph all the same
                loss = 0.0 * self.answers(batch["forget"]).logits.sum()
        self.log_training(finite_losses(mean_over_ranks(losses | values_of(kept)), self.global_step))
        return loss + self.forget_weight * losses["forget_loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients, self._forget_gradients = self._forget_gradients, None
        if gradients is not None:
            self.combine(list(trained_parameters(self.model).values()), gradients)
        super().on_before_optimizer_step(optimizer)
